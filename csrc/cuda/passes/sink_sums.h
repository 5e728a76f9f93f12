// This pass after the backward makes the gradient of the sinks: a row adds -exp(sink - logsumexp) * delta to it.
#pragma once

#include "cuda/mainloop/backward_arguments.h"

namespace attnx::cuda {

struct SinkSumsArguments : BackwardGeometry {
  PerHead sink;
  Tensor logsumexp;
  const float* delta;  // as in BackwardScratch
  int rows_of_tile;
  double* grad_sink;  // [batch, heads_q]
};

void launch_sink_sums(const SinkSumsArguments& args, cudaStream_t stream);

}  // namespace attnx::cuda
