// This pass after the backward makes the gradients of bias and slopes from the sums of its tiles.
#pragma once

#include "cuda/mainloop/backward_arguments.h"

namespace attnx::cuda {

struct ParameterSumsArguments : BackwardGeometry {
  const float *bias_sum, *slope_sum;  // as in BackwardScratch
  int rows_of_tile, score_warps;
  double *grad_bias, *grad_alibi_slopes;  // [batch, heads_q]; null where they are not wanted
};

void launch_parameter_sums(const ParameterSumsArguments& args, cudaStream_t stream);

}  // namespace attnx::cuda
