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

// Over a staircase cache a sequence has queries of its own number.
struct StaircaseCombineArguments : CombineArguments {
  const std::int64_t* query_lengths;  // [batch]; null: all of the call
};

// Partial results of a normalised score are weighted by exp(logsumexp); those of others add up.
void launch_combine(const CombineArguments& args, bool normalised, DType dtype, cudaStream_t stream);
void launch_combine(const StaircaseCombineArguments& args, bool normalised, DType dtype, cudaStream_t stream);

}  // namespace attnx::cuda
