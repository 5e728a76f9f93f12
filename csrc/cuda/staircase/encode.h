// This quantises numbers and packs codes, bit for bit as csrc/cpu/kernel/staircase/encode.h does.
#pragma once

#include "cuda/staircase/number.h"

namespace attnx::cuda {

// This is what a group of numbers shares, as it is stored.
struct CodeRange {
  __half minimum, step;

  CodeRange() = default;
  // The minimum is rounded down, and the step up, so that no number is outside. Zero is +0.
  __device__ CodeRange(float low, float high) : minimum(__float2half_rd(low)) {
    if (__half_as_ushort(minimum) << 1 == 0x10000) minimum = __ushort_as_half(0);
    const double size = (double(high) - double(__half2float(minimum))) / 256;
    step = __float2half_rn(float(size));
    if (double(__half2float(step)) < size) step = __ushort_as_half(std::uint16_t(__half_as_ushort(step) + 1));
  }

  // The code of 8 bits is computed in double, as the definition is. Where all numbers are equal, codes are 0.
  __device__ std::uint8_t code(float x) const {
    const double size = __half_as_ushort(step) ? double(__half2float(step)) : INFINITY;
    const double cell = (double(x) - double(__half2float(minimum))) / size;
    return std::uint8_t(cell < 255 ? int(cell) : 255);
  }
};

// This packs a word of a plane, `above` bits of each code coming before it, of a block of 32 x 32 codes.
__device__ inline std::uint32_t packed_word(const std::uint8_t* codes, int row_stride, int column_stride, int word,
                                            int bits, int above) {
  const int t = word / 8 % 4, g = word % 8, shift = 8 - above - bits;
  std::uint32_t packed = 0;
  for (int k = word / 32 * 16 / bits; k < (word / 32 + 1) * 16 / bits; ++k)
    for (int e = 0; e < 2; ++e) {
      const std::uint32_t code = codes[(k / 4 * 8 + 2 * t + e) * row_stride + (k % 4 * 8 + g) * column_stride];
      packed |= (code >> shift & ((1u << bits) - 1)) << (16 * e + k * bits % 16);
    }
  return packed;
}

}  // namespace attnx::cuda
