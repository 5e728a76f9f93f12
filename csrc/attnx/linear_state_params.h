// These kernels run linear attention over all earlier tokens, by a state that sums them up.
#pragma once

#include "attnx/params.h"

namespace attnx {

// The features of the second Taylor polynomial of exp, of rows of dim numbers: 1, the numbers, and their products.
constexpr std::int64_t taylor_features(std::int64_t dim) { return 1 + dim + dim * (dim + 1) / 2; }

// Query i weighs value j by w_ij, over the sum of these weights: w = phi(q) . phi(k), or with `taylor` 1 + t + t^2 / 2
// with t = scale q . k, which is such a product of taylor_features. A state is [features, value_dim + 1]: the sum of
// phi(k) [v, 1]^T.
struct LinearStateParams {
  DType dtype = DType::kFloat32;
  bool taylor = true;  // in the place of feature_map
  FeatureMap feature_map = FeatureMap::kElu;
  bool is_causal = true;  // a query sees the keys up to its own; else all
  double scale = 1;       // taylor only
  std::int64_t batch = 0, heads_q = 0, heads_k = 0, length_q = 0, length_k = 0, head_dim = 0, value_dim = 0;
  Tensor query, key, value;
  Tensor initial_state;  // [batch, heads_k, features, value_dim + 1] in the accumulator's type; null: zeros

  std::int64_t features() const { return taylor ? taylor_features(head_dim) : head_dim; }
};

struct LinearStateForwardParams : LinearStateParams {
  Tensor output;          // [batch, heads_q, length_q, value_dim]; 0 where the weights of a row sum to 0
  void* state = nullptr;  // after the last key, like initial_state and contiguous; null where it is not wanted
};

struct LinearStateBackwardParams : LinearStateParams {
  Tensor grad_output;  // like the output; null: zeros
  Tensor grad_state;   // like initial_state; null: zeros
  Tensor grad_query, grad_key, grad_value;
  void* grad_initial_state = nullptr;  // contiguous, in the accumulator's type
};

}  // namespace attnx
