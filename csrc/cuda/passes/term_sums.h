// This pass after the sums by key makes the gradients of terms of keys: a number gets the sum of those of all sequences
// and query heads that share it, in one order.
#pragma once

#include "cuda/common/geometry.h"

namespace attnx::cuda {

struct TermSumsArguments : Geometry {
  const float* sums;  // [batch, heads_q, key], as in BackwardPlan
  PerKey factors;     // what is multiplied with these is summed; null: 1
  float* to;          // strides are 0 where one number serves all
  std::int64_t batch_stride, head_stride, key_stride;
};

// Packed keys, of which there are packed_rows_k, have no batch stride. Those that no sequence has get 0.
void launch_term_sums(const TermSumsArguments& args, std::int64_t packed_rows_k, cudaStream_t stream);

}  // namespace attnx::cuda
