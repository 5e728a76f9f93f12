// Numbers are compared as integers where their bits are selected by.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace attnx::cuda {

// The bits have the order of the numbers, and are at least 2^23 - 1 and at most 2^32 - 2^23: those of both zeros are
// equal. x is not NaN.
__device__ __forceinline__ std::uint32_t ordered_bits(float x) {
  const std::uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

}  // namespace attnx::cuda
