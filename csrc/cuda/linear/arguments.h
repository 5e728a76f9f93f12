// The kernels of linear attention are passed this: the call, the part of its heads that one launch serves, and the
// matrices in the workspace. Each launcher here launches one kernel.
//
// A head of keys and the query heads on it are a unit. Each block of keys has a state h_j = phi(K_j)^T [V_j, 1] in 16
// bits, and the sum over the scope of a block of queries is a row of the product of matrices H = M h, where M is 0
// outside of the scope. A state is a mean over the keys of a block, and M's ones are 2^-c with 2^c the number of blocks
// in the scope, or a little more: a sum is then a mean, too, so that 16 bits hold it, and the quotient of numerator and
// denominator is the same.
#pragma once

#include "cuda/common/geometry.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

inline constexpr int kLinearRows = 64;  // of a tile

// It is a matrix [head_dim][value_lanes], and behind it the last column, that of the ones.
struct StateShape {
  int features, value_lanes;
  std::int64_t last, size;  // where the last column begins, and where the next state does: multiples of 8
};

// This is what the backward leaves of a row of queries.
struct LinearRow {
  float inverse, delta;  // 1 / phi(q) z, or 0 without weights; rowsum(grad_output * output)
};

struct LinearArguments : Geometry {  // its tiles are those of kLinearRows queries of one head
  FeatureMap feature_map;
  bool aligned;       // whether all rows lie on 16 bytes
  int heads_of_unit;  // query heads
  int block_q, block_k, query_blocks_of_head, key_blocks_of_head;
  StateShape state;
  std::int64_t first_unit, units;  // of this launch

  const std::int8_t* labels;
  std::int64_t labels_batch_stride, labels_head_stride, labels_row_stride;
  std::int8_t scope_low, scope_high;

  // These have a row for each block of queries of each head of the call.
  void* scope;          // M: [batch * heads_q * query blocks][scope_stride]
  float* scope_scales;  // what M's ones are
  std::int64_t scope_stride;
  // These hold the launch's units.
  void* by_key;     // [unit][key blocks]: states of keys; the backward's sums for each block of keys
  void* by_query;   // [unit][head of the unit][query blocks]: sums over the scope; the backward's states
  LinearRow* rows;  // [unit][head of the unit][length_q], of the backward
};

// This writes M.
void launch_linear_scope(const LinearArguments& args, DType dtype, cudaStream_t stream);

// This makes the states of blocks of keys, or of queries: (phi(Q_i) / n_i)^T [dO_i, -delta_i].
struct StateArguments : LinearArguments {
  Tensor features, values;
  bool of_queries;
};
void launch_linear_states(const StateArguments& args, DType dtype, cudaStream_t stream);

// This sets by_query to the sums of by_key over the scope, or, transposed, by_key to those of by_query.
void launch_linear_product(const LinearArguments& args, bool transposed, DType dtype, cudaStream_t stream);

struct LinearOutputArguments : LinearArguments {
  Tensor query, key, value, output;
};
void launch_linear_output(const LinearOutputArguments& args, DType dtype, cudaStream_t stream);

struct LinearGradArguments : LinearArguments {
  Tensor query, key, value, grad_output, output;
  Tensor grad_query, grad_key, grad_value;  // float32
};
void launch_linear_grad_query(const LinearGradArguments& args, DType dtype, cudaStream_t stream);
template <DType kDType>
void launch_linear_grad_keys(const LinearGradArguments& args, cudaStream_t stream);

}  // namespace attnx::cuda
