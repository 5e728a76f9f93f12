// This computes a chunk of tokens of the gated delta rule by products of matrices (Yang et al., "Gated Delta Networks",
// arXiv 2412.06464, section 3.3). With S the state before the chunk, G_i the sum of its log decays up to token i, and
// for the tokens as rows of matrices
//
//     W_ij = e^(G_i - G_j) k_i . k_j  (j < i)      P_ij = scale e^(G_i - G_j) q_i . k_j  (j <= i)
//
// what is stored of token i is beta_i k_i d_i^T, of the difference d_i = v_i - S_(i-1)^T k_i between its value and
// what the state holds for its key. The differences solve a triangular system:
//
//     D = V - e^G K S - W beta D      O = scale e^G Q S + P beta D      S' = e^G_n S + (c e^(G_n - G) K)^T beta D
//
// where c is the share of the chunk that the state carries on, 1 but for chunks whose tokens are kept elsewhere.
#pragma once

#include "attnx/delta_rule_params.h"

#include "../arena.h"
#include "../math.h"
#include "../rows.h"
#include "../triangle.h"

namespace attnx::cpu::ATTNX_ISA {

inline constexpr std::int64_t kChunk = kDeltaRuleChunk;

// These are the exponentials of the sums of log decays of a chunk, and beta.
template <class Sum>
struct Gates {
  // e to it is 0 in any type; differences between the sums of what is no number, as -inf, would not be numbers.
  static constexpr double kForgets = -1000;

  double sums[kChunk];     // G
  Sum from_start[kChunk];  // e^G_i
  Sum to_end[kChunk];      // e^(G_n - G_i)
  Sum beta[kChunk];
  Sum to_state[kChunk];  // c e^(G_n - G_i)

  void read(const DeltaRuleParams& p, std::int64_t batch, std::int64_t head, std::int64_t first, std::int64_t count) {
    const auto number = [&](const PerToken& x, std::int64_t i) {
      return static_cast<const Sum*>(x.data)[batch * x.batch_stride + head * x.head_stride + i * x.row_stride];
    };
    double sum = 0;
    for (std::int64_t i = 0; i < kChunk; ++i) {
      if (i < count) sum += larger(kForgets, double(number(p.log_decay, first + i)));
      sums[i] = sum;
      beta[i] = i < count ? number(p.beta, first + i) : 0;
    }
    for (std::int64_t i = 0; i < kChunk; ++i) from_start[i] = Sum(sums[i]), to_end[i] = Sum(sum - sums[i]);
    for (std::int64_t i = 0; i < kChunk; i += kLanes<Sum>) {
      store(from_start + i, exp(load(from_start + i)));
      store(to_end + i, exp(load(to_end + i)));
    }
    whole = from_start[kChunk - 1];
    carry = p.carry.data ? number(p.carry, first / kChunk) : 1;
    for (std::int64_t i = 0; i < kChunk; ++i) to_state[i] = carry * to_end[i];
  }

  // to[count][kChunk] are the e^(G_i - G_j), 0 where j > i.
  void decays(std::int64_t count, Sum* to) const {
    const Vec<Sum> lanes = lane_numbers<Sum>();
    for (std::int64_t i = 0; i < count; ++i, to += kChunk) {
      Sum differences[kChunk];
      for (std::int64_t j = 0; j < kChunk; ++j) differences[j] = Sum(sums[i] - sums[j]);
      for (std::int64_t j = 0; j < kChunk; j += kLanes<Sum>) {
        const Vec<Sum> all = j <= i ? exp(load(differences + j)) : Vec<Sum>{};
        store(to + j, lanes + Sum(j) <= Sum(i) ? all : Vec<Sum>{});
      }
    }
  }

  Sum whole;  // e^G_n
  Sum carry;  // c
};

// It divides a row of whole vectors by its norm, and returns by what it multiplied.
template <class Sum>
inline Sum normalize(Sum* row, std::int64_t lanes) {
  Vec<Sum> squares = {};
  for (std::int64_t d = 0; d < lanes; d += kLanes<Sum>) squares += load(row + d) * load(row + d);
  const Sum factor = 1 / __builtin_sqrt(sum_of_lanes<Sum>(squares) + kDeltaRuleEpsilon);
  for (std::int64_t d = 0; d < lanes; ++d) row[d] *= factor;
  return factor;
}

// These are some columns of the values, and so of states and outputs: columns of a state do not meet.
struct ValueColumns {
  std::int64_t first, count, lanes;
};

template <class Input>
class DeltaRuleChunk : public Products<typename Arithmetic<Input>::Sum> {
 public:
  using Sum = typename Arithmetic<Input>::Sum;

  const DeltaRuleParams& p;
  std::int64_t group;      // heads of values of a head of keys
  std::int64_t key_lanes;  // a row of keys
  std::int64_t value_lanes;

  Sum *keys, *queries;         // [count][key_lanes]; queries follow the last key
  Sum* keys_by_feature;        // [key_dim][kChunk]
  Sum* inverse_norms;          // of keys, then of queries, where they are normalised
  Sum *of_keys, *of_queries;   // products with the keys, [count][kChunk], lower triangles; those of queries follow
  Sum* decays;                 // [count][kChunk]
  Sum* coupling;               // -W beta below the diagonal, which alone is read, [count][kChunk]
  Sum *differences, *outputs;  // [count][value_lanes]; outputs follow the last difference
  Sum* scaled;                 // rows on their way into a product, [2 kChunk][key_lanes]
  Gates<Sum>* gates;
  std::int64_t count = 0;  // tokens

  DeltaRuleChunk(const DeltaRuleParams& params, std::int64_t lanes_of_values, Arena& arena)
      : p(params),
        group(p.heads_v / p.heads_k),
        key_lanes(round_up(p.key_dim, kLanes<Sum>)),
        value_lanes(lanes_of_values) {
    const auto take = [&](std::int64_t rows, std::int64_t lanes) {
      return arena.take<Sum>(this->rows_size(rows, lanes));
    };
    keys = take(2 * kChunk, key_lanes);
    keys_by_feature = take(p.key_dim, kChunk);
    inverse_norms = arena.take<Sum>(2 * kChunk);
    of_keys = take(2 * kChunk, kChunk);
    decays = take(kChunk, kChunk);
    coupling = take(kChunk, kChunk);
    differences = take(2 * kChunk, value_lanes);
    scaled = take(2 * kChunk, key_lanes);
    gates = arena.take<Gates<Sum>>(1);
  }

  // This loads a chunk of a head of keys, with queries or without, and makes their products with the keys.
  void begin(std::int64_t batch, std::int64_t key_head, std::int64_t first, bool with_queries) {
    count = smaller(kChunk, p.length - first);
    queries = keys + count * key_lanes;
    of_queries = of_keys + count * kChunk;
    outputs = differences + count * value_lanes;
    load_tokens(p.key, batch, key_head, first, {0, p.key_dim, key_lanes}, keys);
    if (with_queries) load_tokens(p.query, batch, key_head, first, {0, p.key_dim, key_lanes}, queries);
    if (p.normalize)
      for (std::int64_t i = 0; i < (with_queries ? 2 : 1) * count; ++i)
        inverse_norms[i] = normalize(keys + i * key_lanes, key_lanes);
    this->transpose(keys, key_lanes, count, p.key_dim, keys_by_feature, kChunk);
    multiply_to_lower(keys, key_lanes, keys_by_feature, kChunk, of_keys, count, p.key_dim);
    if (with_queries) multiply_to_lower(queries, key_lanes, keys_by_feature, kChunk, of_queries, count, p.key_dim);
  }

  void load_tokens(const Tensor& from, std::int64_t batch, std::int64_t head, std::int64_t first, ValueColumns columns,
                   Sum* to) const {
    for (std::int64_t i = 0; i < count; ++i, to += columns.lanes) {
      convert_row(to, row_of<const Input>(from, batch, head, first + i) + columns.first, columns.count);
      for (std::int64_t d = columns.count; d < columns.lanes; ++d) to[d] = 0;
    }
  }
  void store_tokens(const Sum* from, const Tensor& to, std::int64_t batch, std::int64_t head, std::int64_t first,
                    ValueColumns columns) const {
    for (std::int64_t i = 0; i < count; ++i, from += columns.lanes)
      convert_row(row_of<Input>(to, batch, head, first + i) + columns.first, from, columns.count);
  }

  // This sets what a head of values makes of the loaded chunk.
  void set_gates(std::int64_t batch, std::int64_t head, std::int64_t first) {
    gates->read(p, batch, head, first, count);
    gates->decays(count, decays);
    for (std::int64_t i = 0; i < count; ++i) {
      Sum* const row = coupling + i * kChunk;
      for (std::int64_t j = 0; j <= i; j += kLanes<Sum>)
        store(row + j, -load(decays + i * kChunk + j) * load(of_keys + i * kChunk + j) * load(gates->beta + j));
    }
  }

  // This solves for the differences. With queries it leaves scale e^G Q S as outputs. Without a state it is 0.
  void find_differences(std::int64_t batch, std::int64_t head, std::int64_t first, ValueColumns columns,
                        const Sum* state, bool with_queries) {
    if (state)
      this->multiply(keys, key_lanes, state, value_lanes, differences, (with_queries ? 2 : 1) * count, p.key_dim,
                     false);
    for (std::int64_t i = 0; i < count; ++i) {
      Sum* const row = differences + i * value_lanes;
      const Input* const value = row_of<const Input>(p.value, batch, head, first + i) + columns.first;
      convert_row(scaled, value, columns.count);
      for (std::int64_t d = columns.count; d < value_lanes; ++d) scaled[d] = 0;
      const Sum decay = state ? gates->from_start[i] : 0;
      if (!state) set_zero(row, value_lanes);
      for (std::int64_t d = 0; d < value_lanes; ++d) row[d] = scaled[d] - decay * row[d];
    }
    if (with_queries && !state) set_zero(outputs, count * value_lanes);
    if (with_queries && state) scale_rows(outputs, value_lanes, gates->from_start, Sum(p.scale), outputs);
    solve_lower(coupling, kChunk, differences, value_lanes, count);
  }

  // This turns the state before the chunk into that after it, by beta D.
  void advance(const Sum* corrections, Sum* state) {
    scale_rows(keys, key_lanes, gates->to_state, Sum(1), scaled);
    const Sum whole = gates->whole;
    for (std::int64_t i = 0; i < p.key_dim * value_lanes; ++i) state[i] *= whole;
    this->multiply_transposed(scaled, key_lanes, corrections, value_lanes, state, p.key_dim, count, true);
  }

  // Row i of `to` becomes all * factors[i] * row i.
  void scale_rows(const Sum* rows, std::int64_t lanes, const Sum* factors, Sum all, Sum* to) const {
    for (std::int64_t i = 0; i < count; ++i) {
      const Sum factor = all * factors[i];
      for (std::int64_t d = 0; d < lanes; ++d) to[i * lanes + d] = factor * rows[i * lanes + d];
    }
  }

  // These copy a state between the memory of the user and rows that fill whole vectors.
  void load_state(const Tensor& from, std::int64_t batch, std::int64_t head, ValueColumns columns, Sum* to) const {
    for (std::int64_t k = 0; k < p.key_dim; ++k, to += value_lanes) {
      if (!from.data) {
        set_zero(to, value_lanes);
        continue;
      }
      convert_row(to, row_of<const Sum>(from, batch, head, k) + columns.first, columns.count);
      for (std::int64_t d = columns.count; d < value_lanes; ++d) to[d] = 0;
    }
  }
  void store_state(const Sum* from, void* to, std::int64_t batch, std::int64_t head, ValueColumns columns) const {
    Sum* const state = static_cast<Sum*>(to) + (batch * p.heads_v + head) * p.key_dim * p.value_dim + columns.first;
    for (std::int64_t k = 0; k < p.key_dim; ++k)
      convert_row(state + k * p.value_dim, from + k * value_lanes, columns.count);
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
