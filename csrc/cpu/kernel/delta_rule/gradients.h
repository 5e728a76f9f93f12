// This is what the backward of the gated delta rule makes of a chunk of tokens. With dS the gradient of the state after
// the chunk, and W, P, D and G as in chunk.h,
//
//     Z = P^T dO + c e^(G_n - G) K dS - W^T beta Z     dV = beta Z      dbeta_i = d_i . z_i
//     dW = -dV (beta D)^T (j < i)                      dP = dO (beta D)^T (j <= i)
//     dQ = scale e^G dO S^T + (scale e^(G_i - G_j) dP) K
//     dK = c e^(G_n - G) beta D dS^T - e^G dV S^T + (scale e^(G_i - G_j) dP)^T Q + (M + M^T) K,  M = e^(G_i - G_j) dW
//     dS <- e^G_n dS + (scale e^G Q)^T dO - (e^G K)^T dV
//
// and dG_i is what each exponential adds: a product with its own gradient. dc is that of e^(G_n - G) K and beta D dS^T.
// Z, dV and dS are made column by column of the values; the other gradients sum over columns.
#pragma once

#include "chunk.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class DeltaRuleGradients {
  using Chunk = DeltaRuleChunk<Input>;

 public:
  using Sum = typename Chunk::Sum;

  Chunk chunk;
  Sum* z;  // [count][value_lanes]

  DeltaRuleGradients(const DeltaRuleBackwardParams& p, std::int64_t value_lanes, Arena& arena)
      : chunk(p, value_lanes, arena), p_(p) {
    const auto take = [&](std::int64_t rows, std::int64_t lanes) {
      return arena.take<Sum>(Chunk::rows_size(rows, lanes));
    };
    z = take(kChunk, value_lanes);
    grad_inputs_ = take(2 * kChunk, chunk.key_lanes);
    grad_values_ = take(kChunk, value_lanes);
    grad_outputs_ = take(kChunk, value_lanes);
    corrections_ = take(kChunk, value_lanes);
    by_column_ = arena.take<Sum>(round_up(p.value_dim, kLanes<Sum>) * larger(chunk.key_lanes, kChunk));
    pairs_ = take(2 * kChunk, kChunk);
    of_states_ = take(2 * kChunk, chunk.key_lanes);
    grad_sums_ = arena.take<Sum>(kChunk);
    grad_beta_ = arena.take<Sum>(kChunk);
  }

  // This loads a chunk of a head of keys, and no gradient of it yet.
  void begin(std::int64_t batch, std::int64_t key_head, std::int64_t first) {
    chunk.begin(batch, key_head, first, true);
    set_zero(grad_inputs_, 2 * chunk.count * chunk.key_lanes);
  }

  // This sets what a head of values makes of the loaded chunk.
  void set_head(std::int64_t batch, std::int64_t head, std::int64_t first, ValueColumns columns) {
    chunk.set_gates(batch, head, first);
    if (p_.grad_output.data) {
      chunk.load_tokens(p_.grad_output, batch, head, first, columns, grad_outputs_);
    } else {
      set_zero(grad_outputs_, chunk.count * chunk.value_lanes);
    }
  }

  // This finds Z. The factors of scale P^T dO are a copy of the products of queries.
  void find_z(const Sum* grad_state) {
    for (std::int64_t i = 0; i < chunk.count * kChunk; ++i)
      pairs_[i] = Sum(p_.scale) * chunk.decays[i] * chunk.of_queries[i];
    multiply_lower_transposed(pairs_, kChunk, grad_outputs_, chunk.value_lanes, z, chunk.count, false);
    chunk.scale_rows(chunk.keys, chunk.key_lanes, chunk.gates->to_state, Sum(1), chunk.scaled);
    Chunk::multiply(chunk.scaled, chunk.key_lanes, grad_state, chunk.value_lanes, z, chunk.count, p_.key_dim, true);
    for (std::int64_t i = 0; i < chunk.count; ++i) {
      Sum *const to = pairs_ + i * kChunk, *const decays = chunk.decays + i * kChunk,
                 *const products = chunk.of_keys + i * kChunk;
      for (std::int64_t j = 0; j < kChunk; ++j) to[j] = -chunk.gates->beta[i] * decays[j] * products[j];
    }
    solve_lower_transposed(pairs_, kChunk, z, chunk.value_lanes, chunk.count);
  }

  // This makes dV of Z.
  void find_grad_values() { chunk.scale_rows(z, chunk.value_lanes, chunk.gates->beta, Sum(1), grad_values_); }

  void store_grad_values(std::int64_t batch, std::int64_t head, std::int64_t first, ValueColumns columns) const {
    chunk.store_tokens(grad_values_, p_.grad_value, batch, head, first, columns);
  }

  // The gradient of the state before the chunk takes the place of that after it.
  void pass_state(Sum* grad_state) {
    const Sum whole = chunk.gates->whole;
    for (std::int64_t i = 0; i < p_.key_dim * chunk.value_lanes; ++i) grad_state[i] *= whole;
    chunk.scale_rows(chunk.queries, chunk.key_lanes, chunk.gates->from_start, Sum(p_.scale), chunk.scaled);
    Chunk::multiply_transposed(chunk.scaled, chunk.key_lanes, grad_outputs_, chunk.value_lanes, grad_state, p_.key_dim,
                               chunk.count, true);
    chunk.scale_rows(chunk.keys, chunk.key_lanes, chunk.gates->from_start, Sum(-1), chunk.scaled);
    Chunk::multiply_transposed(chunk.scaled, chunk.key_lanes, grad_values_, chunk.value_lanes, grad_state, p_.key_dim,
                               chunk.count, true);
  }

  // This adds the gradients of queries and keys of a head of values, and stores those of its gates, of the state before
  // the chunk, the differences in it and the gradient of the state after it.
  void add_head(std::int64_t batch, std::int64_t head, std::int64_t first, const Sum* before, const Sum* differences,
                const Sum* grad_state) {
    const std::int64_t count = chunk.count, lanes = chunk.value_lanes;
    chunk.scale_rows(differences, lanes, chunk.gates->beta, Sum(1), corrections_);
    set_zero(grad_sums_, kChunk);
    grad_sums_[count - 1] = chunk.gates->whole * dot(before, grad_state, p_.key_dim * lanes);
    for (std::int64_t i = 0; i < count; ++i) grad_beta_[i] = dot(differences + i * lanes, z + i * lanes, lanes);
    const Sum grad_carry = add_by_states(before, grad_state);
    const std::int64_t place = (batch * p_.heads_v + head) * p_.chunks() + first / kChunk;
    if (p_.grad_carry) static_cast<Sum*>(p_.grad_carry)[place] = grad_carry;
    add_by_pairs();
    store_gates(batch, head, first);
  }

  void store_grad_inputs(std::int64_t batch, std::int64_t key_head, std::int64_t first) {
    if (p_.normalize) pass_norms();
    const ValueColumns features{0, p_.key_dim, chunk.key_lanes};
    chunk.store_tokens(grad_inputs_, p_.grad_query, batch, key_head, first, features);
    chunk.store_tokens(grad_inputs_ + chunk.count * chunk.key_lanes, p_.grad_key, batch, key_head, first, features);
  }

 private:
  // This adds what reaches queries and keys by the states before and after the chunk, and returns the gradient of
  // chunk.
  Sum add_by_states(const Sum* before, const Sum* grad_state) {
    Sum* const to_keys = of_states_ + chunk.count * chunk.key_lanes;
    Chunk::transpose(before, chunk.value_lanes, p_.key_dim, p_.value_dim, by_column_, chunk.key_lanes);
    Chunk::multiply(grad_outputs_, chunk.value_lanes, by_column_, chunk.key_lanes, of_states_, chunk.count,
                    p_.value_dim, false);
    chunk.scale_rows(of_states_, chunk.key_lanes, chunk.gates->from_start, Sum(p_.scale), of_states_);
    Chunk::multiply(grad_values_, chunk.value_lanes, by_column_, chunk.key_lanes, to_keys, chunk.count, p_.value_dim,
                    false);
    chunk.scale_rows(to_keys, chunk.key_lanes, chunk.gates->from_start, Sum(-1), to_keys);
    for (std::int64_t i = 0; i < chunk.count; ++i)
      grad_sums_[i] += dot_of_rows(of_states_, chunk.queries, i) + dot_of_rows(to_keys, chunk.keys, i);
    const std::int64_t size = chunk.count * chunk.key_lanes;
    for (std::int64_t i = 0; i < 2 * size; ++i) grad_inputs_[i] += of_states_[i];

    Chunk::transpose(grad_state, chunk.value_lanes, p_.key_dim, p_.value_dim, by_column_, chunk.key_lanes);
    Chunk::multiply(corrections_, chunk.value_lanes, by_column_, chunk.key_lanes, to_keys, chunk.count, p_.value_dim,
                    false);
    chunk.scale_rows(to_keys, chunk.key_lanes, chunk.gates->to_end, Sum(1), to_keys);
    // These are the gradients of e^(G_n - G_i), which is 1 for the last token.
    Sum grad_carry = 0;
    for (std::int64_t i = 0; i < chunk.count; ++i) {
      const Sum both = dot_of_rows(to_keys, chunk.keys, i);
      grad_carry += both;
      if (i == chunk.count - 1) break;
      grad_sums_[i] -= chunk.gates->carry * both;
      grad_sums_[chunk.count - 1] += chunk.gates->carry * both;
    }
    for (std::int64_t i = 0; i < size; ++i) grad_inputs_[size + i] += chunk.gates->carry * to_keys[i];
    return grad_carry;
  }
  Sum dot_of_rows(const Sum* x, const Sum* y, std::int64_t i) const {
    return dot(x + i * chunk.key_lanes, y + i * chunk.key_lanes, chunk.key_lanes);
  }

  // This adds what reaches queries and keys by the pairs of tokens of the chunk: dP and M + M^T are the factors of
  // keys.
  void add_by_pairs() {
    const std::int64_t count = chunk.count;
    Sum *const of_queries = pairs_, *const of_keys = pairs_ + count * kChunk;
    Sum* const grad_keys = grad_inputs_ + count * chunk.key_lanes;
    Chunk::transpose(corrections_, chunk.value_lanes, count, p_.value_dim, by_column_, kChunk);
    Chunk::multiply(grad_outputs_, chunk.value_lanes, by_column_, kChunk, of_queries, count, p_.value_dim, false);
    Chunk::multiply(grad_values_, chunk.value_lanes, by_column_, kChunk, of_keys, count, p_.value_dim, false);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t row = i * kChunk;
      Sum sum = 0;
      for (std::int64_t j = 0; j < kChunk; ++j) {
        of_queries[row + j] *= Sum(p_.scale) * chunk.decays[row + j];
        of_keys[row + j] *= -chunk.decays[row + j];
      }
      of_keys[row + i] = 0;
      for (std::int64_t j = 0; j < i; ++j) {
        const Sum both = of_queries[row + j] * chunk.of_queries[row + j] + of_keys[row + j] * chunk.of_keys[row + j];
        sum += both;
        grad_sums_[j] -= both;
      }
      grad_sums_[i] += sum;
    }
    Chunk::multiply_transposed(of_queries, kChunk, chunk.queries, chunk.key_lanes, grad_keys, count, count, true);
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t j = 0; j < i; ++j) of_keys[j * kChunk + i] = of_keys[i * kChunk + j];
    Chunk::multiply(pairs_, kChunk, chunk.keys, chunk.key_lanes, grad_inputs_, 2 * count, count, true);
  }

  // Gradients of x / |x| become those of x. Those of queries are first, and the rows of keys.
  void pass_norms() {
    for (std::int64_t i = 0; i < 2 * chunk.count; ++i) {
      const std::int64_t place = (i + chunk.count) % (2 * chunk.count);
      const Sum* const row = chunk.keys + place * chunk.key_lanes;
      Sum* const grad = grad_inputs_ + i * chunk.key_lanes;
      const Sum product = dot(grad, row, chunk.key_lanes), factor = chunk.inverse_norms[place];
      for (std::int64_t d = 0; d < chunk.key_lanes; ++d) grad[d] = factor * (grad[d] - product * row[d]);
    }
  }

  // A log decay is in its own sum and in those of all later tokens of the chunk.
  void store_gates(std::int64_t batch, std::int64_t head, std::int64_t first) const {
    const std::int64_t place = (batch * p_.heads_v + head) * p_.length + first;
    convert_row(static_cast<Sum*>(p_.grad_beta) + place, grad_beta_, chunk.count);
    Sum* const to = static_cast<Sum*>(p_.grad_log_decay) + place;
    Sum sum = 0;
    for (std::int64_t i = chunk.count - 1; i >= 0; --i) to[i] = sum += grad_sums_[i];
  }

  // n is a whole number of vectors. A long sum is one of shorter ones.
  static Sum dot(const Sum* x, const Sum* y, std::int64_t n) {
    constexpr std::int64_t kPart = 16 * kLanes<Sum>;
    Vec<Sum> all = {};
    for (std::int64_t first = 0; first < n; first += kPart) {
      Vec<Sum> sum = {};
      for (std::int64_t i = first; i < smaller(first + kPart, n); i += kLanes<Sum>) sum += load(x + i) * load(y + i);
      all += sum;
    }
    return sum_of_lanes<Sum>(all);
  }

  const DeltaRuleBackwardParams& p_;
  Sum* grad_inputs_;                                 // of queries, then of keys, [count][key_lanes]
  Sum *grad_values_, *grad_outputs_, *corrections_;  // dV, dO and beta D, [count][value_lanes]
  Sum* by_column_;                                   // a state, or corrections, transposed
  Sum* pairs_;                                       // of dP, then of M, [count][kChunk]
  Sum* of_states_;               // what reaches queries and keys by the states, [2 count][key_lanes]
  Sum *grad_sums_, *grad_beta_;  // [kChunk]
};

}  // namespace attnx::cpu::ATTNX_ISA
