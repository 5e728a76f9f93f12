// This defines the arguments of the kernels that make dQ from its sums.
#pragma once

#include "cuda/mainloop/backward_arguments.h"

namespace attnx::cuda {

struct GradQueryArguments : BackwardGeometry {
  float scale;
  const float* sums;  // BackwardScratch::grad_query_sum
  Tensor grad_query;
  Tensor addend;  // in float32; null: none
};

}  // namespace attnx::cuda
