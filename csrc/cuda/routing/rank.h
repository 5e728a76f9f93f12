// Scores are ranked by integers.
#pragma once

#include "cuda/common/ordered_bits.h"

namespace attnx::cuda {

// Ranks have the order of the numbers. Zeros of both signs are equal, and NaN has the rank 0, below all numbers.
__device__ __forceinline__ std::uint32_t rank_of(float x) { return x != x ? 0 : ordered_bits(x); }

}  // namespace attnx::cuda
