// This says how a call falls into tiles; the plans of both directions and mainloops share it.
#pragma once

#include <initializer_list>
#include <iterator>
#include <utility>

#include "attnx/params.h"
#include "attnx/policies.h"
#include "cuda/common/geometry.h"

namespace attnx::cuda {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// These tell whether every row starts on 16 bytes and fills whole ones, as copies of 16 bytes need.
bool is_aligned(const AttentionParams& params, const Tensor& x, std::int64_t heads, std::int64_t features);
bool are_aligned(const AttentionParams& params, std::initializer_list<Tensor> of_query,
                 std::initializer_list<Tensor> of_key, std::initializer_list<Tensor> of_value);

// This counts the query heads whose rows share a tile. All that share a key head do, but with lists each query head is
// alone, because it has lists of its own, and so it is with terms in the logits, which are its own.
std::int64_t heads_in_tile(const AttentionParams& params);
// This counts the same where tiles of so many rows must hold whole groups, as boxes of TMA do.
std::int64_t whole_heads_in_tile(const AttentionParams& params, int rows_of_tile);

// It throws std::runtime_error where there are too many rows or keys.
Geometry geometry_of(const AttentionParams& params, int rows_of_tile, std::int64_t group);
LogitScaling scaling_of(const AttentionParams& params);

// This returns the first of the table's head dimensions that holds the call's.
template <const auto& kTable>
int padded_head_dim(const AttentionParams& p) {
  const auto wanted = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  const auto* found = std::begin(kTable);
  while (*found < wanted) ++found;
  return *found;
}

// This calls action.template operator()<head_dim>() for the padded head dimension of the table.
template <const auto& kTable, class Action>
void with_head_dim(const AttentionParams& p, const Action& action) {
  const int head_dim = padded_head_dim<kTable>(p);
  [&]<std::size_t... kAt>(std::index_sequence<kAt...>) {
    (void)((head_dim == kTable[kAt] && (action.template operator()<kTable[kAt]>(), true)) || ...);
  }(std::make_index_sequence<std::size(kTable)>());
}

// This calls action.template operator()<DType>() for one of the dtypes that have kernels.
template <class Action>
void with_dtype(DType dtype, const Action& action) {
  if (dtype == DType::kBFloat16) return action.template operator()<DType::kBFloat16>();
  return action.template operator()<DType::kFloat16>();
}

// This calls action.template operator()<Score>() for the score whose backward kernels serve the call's.
template <class Action>
void with_backward_score(Score score, const Action& action) {
  with_score(score, [&]<Score kScore>() { action.template operator()<backward_score(kScore)>(); });
}

}  // namespace attnx::cuda
