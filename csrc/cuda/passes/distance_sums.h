// This pass after the sums by band makes the gradient of numbers by distance: a number gets the sum of those of all
// bands, sequences and query heads that have it, in one order.
#pragma once

#include <cuda_runtime_api.h>

#include "attnx/params.h"
#include "cuda/reduction/distance_bands.h"

namespace attnx::cuda {

struct DistanceSumsArguments {
  const float* sums;  // [batch, heads, band, sum of the band]
  DistanceBands bands;
  int batch, heads, length_q, length_k;
  PairMask to;  // by distance
};

void launch_distance_sums(const DistanceSumsArguments& args, cudaStream_t stream);

}  // namespace attnx::cuda
