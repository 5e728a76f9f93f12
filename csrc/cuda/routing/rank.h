// Scores are ranked by integers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace attnx::cuda {

// Ranks have the order of the numbers. Zeros of both signs are equal, and NaN has the rank 0, below all numbers.
__device__ __forceinline__ std::uint32_t rank_of(float x) {
  const std::uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  if (x != x) return 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace attnx::cuda
