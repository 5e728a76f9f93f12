// This is what dispatch tells a unit of sums over scores: there is one for each score, dtype and padded head dimension.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/mainloop/sums_arguments.h"

namespace attnx::cuda {

struct SumsCall {
  Geometry geometry;
  LogitScaling scaling;
  RowNumbers rows;
  bool aligned;
  cudaStream_t stream;
};

// This makes the gradients of what logits get.
struct GradSumsCall : SumsCall {
  const BackwardParams& params;
};

template <Score kScore, DType kDType, int kHeadDim>
void launch_grad_sums_sm80(const GradSumsCall& call);

}  // namespace attnx::cuda
