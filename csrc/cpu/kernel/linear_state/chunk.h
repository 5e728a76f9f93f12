// This is a chunk of tokens of linear attention with a state. Its own pairs meet as products of rows, and they meet the
// tokens before it by the state. Rows are what products of pairs are made of: phi(x), or x itself where weights are the
// Taylor polynomial of a product (Arora et al., "Simple linear attention language models", BASED, arXiv 2402.18668),
// whose features are made here and nowhere kept.
#pragma once

#include "attnx/linear_state_params.h"

#include "../arena.h"
#include "../linear/features.h"
#include "../rows.h"
#include "../triangle.h"

namespace attnx::cpu::ATTNX_ISA {

// These are some rows of a state: they do not meet where keys are added.
struct FeatureRows {
  std::int64_t first, count;
};

template <class Input>
class LinearStateChunk : public Products<typename Arithmetic<Input>::Sum> {
 public:
  using Sum = typename Arithmetic<Input>::Sum;
  static constexpr std::int64_t kTokens = 64;

  const LinearStateParams& p;
  std::int64_t group, features;
  std::int64_t row_lanes, feature_lanes, value_lanes;

  Sum *queries, *keys;        // rows, [kTokens][row_lanes]
  Sum *of_queries, *of_keys;  // their features, [kTokens][feature_lanes]
  Sum* values;                // [v, 1], [kTokens][value_lanes]
  Sum* outputs;               // numerators, and the denominator, likewise
  Sum *weights, *slopes;      // of pairs, [kTokens][kTokens]; slopes: dw / dt of the polynomial
  Sum* by_column;             // keys, or values, transposed

  LinearStateChunk(const LinearStateParams& params, Arena& arena)
      : p(params),
        group(p.heads_q / p.heads_k),
        features(p.features()),
        row_lanes(round_up(p.head_dim, kLanes<Sum>)),
        feature_lanes(round_up(features, kLanes<Sum>)),
        value_lanes(round_up(p.value_dim + 1, kLanes<Sum>)) {
    const auto take = [&](std::int64_t rows, std::int64_t lanes) {
      return arena.take<Sum>(this->rows_size(rows, lanes));
    };
    queries = take(kTokens, row_lanes);
    keys = take(kTokens, row_lanes);
    of_queries = p.taylor ? take(kTokens, feature_lanes) : queries;
    of_keys = p.taylor ? take(kTokens, feature_lanes) : keys;
    values = take(kTokens, value_lanes);
    outputs = take(kTokens, value_lanes);
    weights = take(kTokens, kTokens);
    slopes = take(kTokens, kTokens);
    by_column = arena.take<Sum>(larger(p.head_dim, p.value_dim + 1) * kTokens);
  }

  std::int64_t state_size() const { return features * value_lanes; }
  FeatureRows all_rows() const { return {0, features}; }

  static std::int64_t tokens(std::int64_t first, std::int64_t length) { return smaller(kTokens, length - first); }

  void load_queries(std::int64_t batch, std::int64_t head, std::int64_t first, bool with_features = true) const {
    load_rows(p.query, batch, head, first, tokens(first, p.length_q), p.taylor ? Sum(p.scale) : 1, queries,
              with_features ? of_queries : nullptr);
  }
  void load_keys(std::int64_t batch, std::int64_t head, std::int64_t first, bool with_features = true) const {
    const std::int64_t count = tokens(first, p.length_k);
    load_rows(p.key, batch, head, first, count, 1, keys, with_features ? of_keys : nullptr);
    for (std::int64_t i = 0; i < count; ++i) {
      Sum* const row = values + i * value_lanes;
      convert_row(row, row_of<const Input>(p.value, batch, head, first + i), p.value_dim);
      row[p.value_dim] = 1;
      for (std::int64_t d = p.value_dim + 1; d < value_lanes; ++d) row[d] = 0;
    }
  }

  // This weighs the pairs of loaded rows; in one chunk a weight is 0 where the key comes after the query.
  void weigh_pairs(std::int64_t count, std::int64_t count_of_keys, bool same_chunk) const {
    this->transpose(keys, row_lanes, count_of_keys, p.head_dim, by_column, kTokens);
    this->multiply(queries, row_lanes, by_column, kTokens, weights, count, p.head_dim, false);
    const Vec<Sum> lanes = lane_numbers<Sum>();
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t j = 0; j < kTokens; j += kLanes<Sum>) {
        const std::int64_t at = i * kTokens + j;
        const Vec<Sum> t = load(weights + at), slope = p.taylor ? t + Sum(1) : Vec<Sum>{} + Sum(1);
        const Vec<Sum> weight = p.taylor ? t * (t * Sum(0.5) + Sum(1)) + Sum(1) : t;
        const auto seen = lanes + Sum(j) <= (same_chunk ? Sum(i) : Sum(kTokens));
        store(weights + at, seen ? weight : Vec<Sum>{});
        store(slopes + at, seen ? slope : Vec<Sum>{});
      }
  }

  // This makes the outputs of loaded queries, before they are normalised, with the pairs of the chunk if asked.
  void attend(std::int64_t count, const Sum* state, bool own_pairs) const {
    multiply_few(of_queries, feature_lanes, state, value_lanes, outputs, count, features);
    if (own_pairs) multiply_lower(weights, kTokens, values, value_lanes, outputs, count, true);
  }

  // These add the sum of phi(k) [v, 1]^T, or another such product, to some rows of a state.
  void add_keys(std::int64_t count, FeatureRows rows, Sum* state) const {
    add_products(of_keys, values, count, rows, state);
  }
  void add_products(const Sum* of_rows, const Sum* numbers, std::int64_t count, FeatureRows rows, Sum* state) const {
    this->multiply_transposed(of_rows + rows.first, feature_lanes, numbers, value_lanes,
                              state + rows.first * value_lanes, rows.count, count, true);
  }

  // This adds the gradient of rows that their features have. Without a polynomial rows are features themselves.
  void add_gradient(const Sum* rows, const Sum* of_features, std::int64_t count, Sum* grad_rows) const {
    const std::int64_t dim = p.head_dim;
    const Sum kDiagonal = Sum(1.4142135623730951);
    for (std::int64_t i = 0; i < count; ++i, rows += row_lanes, of_features += feature_lanes, grad_rows += row_lanes) {
      if (!p.taylor) {
        for (std::int64_t d = 0; d < dim; ++d) grad_rows[d] += of_features[d];
        continue;
      }
      for (std::int64_t d = 0; d < dim; ++d) grad_rows[d] += of_features[1 + d];
      const Sum* pairs = of_features + 1 + dim;
      for (std::int64_t a = 0; a < dim; pairs += dim - a, ++a) {
        Sum sum = kDiagonal * pairs[0] * rows[a];
        for (std::int64_t b = a + 1; b < dim; ++b) {
          sum += pairs[b - a] * rows[b];
          grad_rows[b] += pairs[b - a] * rows[a];
        }
        grad_rows[a] += sum;
      }
    }
  }

  // This stores gradients of rows as the user has them.
  void store_rows(Sum* grad_rows, const Sum* rows, const Tensor& to, std::int64_t batch, std::int64_t head,
                  std::int64_t first, std::int64_t count, Sum factor) const {
    for (std::int64_t i = 0; i < count; ++i) {
      Sum* const grad = grad_rows + i * row_lanes;
      if (!p.taylor) differentiate_features(p.feature_map, rows + i * row_lanes, grad, p.head_dim);
      for (std::int64_t d = 0; d < p.head_dim; ++d) grad[d] *= factor;
      convert_row(row_of<Input>(to, batch, head, first + i), grad, p.head_dim);
    }
  }

  void load_state(const Tensor& from, std::int64_t batch, std::int64_t head, FeatureRows rows, Sum* to) const {
    for (std::int64_t f = rows.first; f < rows.first + rows.count; ++f) {
      set_zero(to + f * value_lanes, value_lanes);
      if (from.data) convert_row(to + f * value_lanes, row_of<const Sum>(from, batch, head, f), p.value_dim + 1);
    }
  }
  void store_state(const Sum* from, void* to, std::int64_t batch, std::int64_t head, FeatureRows rows) const {
    const std::int64_t columns = p.value_dim + 1;
    Sum* const state = static_cast<Sum*>(to) + (batch * p.heads_k + head) * features * columns;
    for (std::int64_t f = rows.first; f < rows.first + rows.count; ++f)
      convert_row(state + f * columns, from + f * value_lanes, columns);
  }
  // This takes some rows of a state to the next one.
  void copy_state(const Sum* from, FeatureRows rows, Sum* to) const {
    const std::int64_t first = rows.first * value_lanes;
    convert_row(to + first, from + first, rows.count * value_lanes);
  }

 private:
  void load_rows(const Tensor& from, std::int64_t batch, std::int64_t head, std::int64_t first, std::int64_t count,
                 Sum factor, Sum* rows, Sum* of_rows) const {
    for (std::int64_t i = 0; i < count; ++i, rows += row_lanes) {
      convert_row(rows, row_of<const Input>(from, batch, head, first + i), p.head_dim);
      for (std::int64_t d = p.head_dim; d < row_lanes; ++d) rows[d] = 0;
      if (!p.taylor) {
        map_features(p.feature_map, rows, p.head_dim);
        for (std::int64_t d = p.head_dim; d < row_lanes; ++d) rows[d] = 0;
      } else {
        for (std::int64_t d = 0; d < p.head_dim; ++d) rows[d] *= factor;
        if (of_rows) expand(rows, of_rows + i * feature_lanes);
      }
    }
  }

  // The features are 1, x_a, and x_a x_b for a <= b, where those of a = b are divided by the square root of 2.
  void expand(const Sum* x, Sum* to) const {
    const std::int64_t dim = p.head_dim;
    const Sum kDiagonal = Sum(0.7071067811865476);
    to[0] = 1;
    for (std::int64_t d = 0; d < dim; ++d) to[1 + d] = x[d];
    Sum* pairs = to + 1 + dim;
    for (std::int64_t a = 0; a < dim; pairs += dim - a, ++a) {
      for (std::int64_t b = a; b < dim; ++b) pairs[b - a] = x[a] * x[b];
      pairs[0] *= kDiagonal;
    }
    for (std::int64_t f = features; f < feature_lanes; ++f) to[f] = 0;
  }

  // This is a product that may have as few rows as a decode step has.
  void multiply_few(const Sum* a, std::int64_t a_lanes, const Sum* b, std::int64_t b_lanes, Sum* c, std::int64_t rows,
                    std::int64_t steps) const {
    using A = FusedMultiplyAdd<Sum>;
    if (rows > kFewRowMultiple) return this->multiply(a, a_lanes, b, b_lanes, c, rows, steps, false);
    gemm_few_rows<A>({a, a_lanes, 1, b, b_lanes, c, b_lanes}, rows, b_lanes / kLanes<Sum>, steps, false);
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
