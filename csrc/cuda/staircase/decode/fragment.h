// Codes become operands of mma.m16n8k16 here, one LOP3 a pair.
//
// A code is left where it stands in its half of a word, at most 10 bits from the bottom, and read as a float16: it is
// then subnormal, code * 2^place * 2^-24 exactly, which tensor cores multiply like any other number. So nothing is
// converted: the step of a row goes into the other operand, whose rows are the same, the place, which belongs to the
// column, and 2^-24 into the sums, and the middle of the lowest cell is a product of its own.
#pragma once

#include "cuda/common/ptx.h"

namespace attnx::cuda {

// This is where a code of the first plane stands in its half, for columns 8j to 8j + 7 of a block.
template <int kBits>
__host__ __device__ constexpr int place_of(int j) {
  return kBits == 8 ? 0 : kBits == 4 ? j % 2 * 4 : j * kBits;
}

// The sum of products with codes of the first plane, of columns 8j to 8j + 7, is multiplied with this.
template <int kBits>
__host__ __device__ constexpr float unit_of(int j) {
  return float(std::uint32_t(1) << (24 - place_of<kBits>(j))) * float(1 << (8 - kBits));
}

// This is a register of the A fragment: rows 8f + 2t and 8f + 2t + 1 of column 8j + g, in a plane of kBits after a
// first one of kFirstBits. A code that stands in the upper half of its 16 bits is shifted down.
template <int kFirstBits, int kBits, bool kFirst>
__device__ __forceinline__ std::uint32_t code_pair(const std::uint32_t (&words)[kBits], int j, int f) {
  const int k = j + 4 * f, bit = k * kBits % 16, place = kFirst ? bit % 8 : place_of<kFirstBits>(j);
  const std::uint32_t word = words[k * kBits / 16], mask = (std::uint32_t(0x10001) << kBits) - 0x10001;
  return (place <= bit ? word >> (bit - place) : word << (place - bit)) & mask << place;
}

__device__ __forceinline__ std::uint32_t multiply_halves(std::uint32_t x, std::uint32_t y) {
  std::uint32_t z;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
__device__ __forceinline__ std::uint32_t multiply_add_halves(std::uint32_t x, std::uint32_t y, std::uint32_t z) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(z) : "r"(x), "r"(y));
  return z;
}
// This returns 2^exponent twice.
__device__ __forceinline__ constexpr std::uint32_t power_pair(int exponent) {
  return std::uint32_t(exponent + 15) * 0x04000400;
}

// This transposes an 8 x 8 matrix of 16-bit numbers, of which lane 4i + j has numbers 2j and 2j + 1 of row i.
__device__ __forceinline__ std::uint32_t transpose(std::uint32_t x) {
  std::uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// These are the ranges of a lane's rows 8f + 2t and 8f + 2t + 1 of a block: steps, and the middles of the lowest cells.
struct RowRanges {
  std::uint32_t step[4], middle[4];

  // The words of a row are (minimum, step); `half_cell` is half a cell, in steps.
  __device__ __forceinline__ RowRanges(std::uint32_t rows, std::uint32_t half_cell) {
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      uint2 pair;
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(pair.x), "=r"(pair.y) : "r"(rows + f * 32) : "memory");
      step[f] = __byte_perm(pair.x, pair.y, 0x7632);
      middle[f] = multiply_add_halves(step[f], half_cell, __byte_perm(pair.x, pair.y, 0x5410));
    }
  }
};

// This adds the products of a plane's codes to the sums of columns [16 m + 8 i + g] and the rows of `b`.
template <int kFirstBits, int kBits, bool kFirst>
__device__ __forceinline__ void multiply_codes(float (&sums)[2][4], const std::uint32_t (&words)[kBits],
                                               const std::uint32_t (&b)[4]) {
#pragma unroll
  for (int kk = 0; kk < 2; ++kk)
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const auto pair = [&](int j, int f) {
        return code_pair<kFirstBits, kBits, kFirst>(words, 2 * m + j, 2 * kk + f);
      };
      const std::uint32_t a[4] = {pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1)};
      multiply_add(sums[m], a, b[2 * kk], b[2 * kk + 1], __half());
    }
}

// This does so for all planes of a block of codes. `codes` has the lane's words of the first plane in shared memory,
// and `planes` those of the others, up to the one that is null, in global memory.
template <int kBits, bool kRefined>
__device__ __forceinline__ void multiply_block(float (&sums)[2][4], std::uint32_t codes,
                                               const std::uint32_t* const (&planes)[3],
                                               const std::uint32_t (&operand)[4], const RowRanges& ranges) {
  std::uint32_t b[4];
#pragma unroll
  for (int f = 0; f < 4; ++f) b[f] = multiply_halves(operand[f], ranges.step[f]);
  const auto multiply_plane = [&]<int kOwn>(const std::uint32_t* from, int shift, std::integral_constant<int, kOwn>) {
    if (!from) return;
    std::uint32_t words[kOwn], own[4];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) words[i] = __ldg(from + i * 32);
#pragma unroll
    for (int f = 0; f < 4; ++f) own[f] = multiply_halves(b[f], power_pair(-shift));
    multiply_codes<kBits, kOwn, false>(sums, words, own);
  };
  if constexpr (kRefined && kBits <= 4) multiply_plane(planes[0], kBits, std::integral_constant<int, kBits>());
  if constexpr (kRefined && kBits <= 2) multiply_plane(planes[1], 3 * kBits, std::integral_constant<int, 2 * kBits>());
  if constexpr (kRefined && kBits == 1) multiply_plane(planes[2], 7 * kBits, std::integral_constant<int, 4 * kBits>());

  std::uint32_t words[kBits];
#pragma unroll
  for (int i = 0; i < kBits; ++i) words[i] = load_shared_word(codes + i * 128);
  // Of one bit, 16 share a word, and rows 8 to 15 and 24 to 31 stand 4 places higher than the others.
  if constexpr (kBits == 1) {
    b[1] = multiply_halves(b[1], power_pair(-4));
    b[3] = multiply_halves(b[3], power_pair(-4));
  }
  multiply_codes<kBits, kBits, true>(sums, words, b);
}

}  // namespace attnx::cuda
