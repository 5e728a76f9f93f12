// This is the second pass of a forward whose keys are split: it makes one output from the partial ones.
#pragma once

#include "cuda/mainloop/forward_arguments.h"

namespace attnx::cuda {

struct CombineArguments : ForwardGeometry {
  Tensor output, logsumexp;
  PartialResults partial;
  int padded_rows;  // of a head: query_blocks * rows of a tile
  int features;     // of a partial row
};

// Partial results of a normalised score are weighted by exp(logsumexp); those of others add up.
void launch_combine(const CombineArguments& args, bool normalised, DType dtype, cudaStream_t stream);

}  // namespace attnx::cuda
