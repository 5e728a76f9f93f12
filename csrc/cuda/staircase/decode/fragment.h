// Codes become operands of mma.m16n8k16 here, one LOP3 a pair.
//
// A code is left where it stands in its half of a word, at most 10 bits from the bottom, and read as a float16: it is
// then subnormal, code * 2^place * 2^-24 exactly, which tensor cores multiply like any other number. So nothing is
// converted: the step of a row goes into the other operand, whose rows are the same, the place, which belongs to the
// column, and 2^-24 into the sums, and the middle of the lowest cell is a product of its own.
#pragma once

#include <type_traits>

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

// These are a lane's words of a block of codes in a plane, from shared memory. Where a warp has 16 of its columns, kM
// is 1 instead of 2, and the upper ones are moved to where the lower ones stand.
template <int kBits, int kM>
__device__ __forceinline__ void load_words(std::uint32_t (&words)[kBits], std::uint32_t codes, bool upper) {
  const bool move = kM == 1 && upper;
#pragma unroll
  for (int i = 0; i < kBits; i += kM == 1 && kBits == 8 ? 2 : 1)
    words[i] = kBits == 8 ? load_shared_word(codes + (i + move) * 128)
                          : load_shared_word(codes + i * 128) >> (move ? 2 * kBits : 0);
}

// This adds the products of a plane's codes to the sums of columns [16 m + 8 i + g], for each tile of rows. The operand
// (tile, f) has the rows' numbers that meet the block's rows 8f + 2t and 8f + 2t + 1. Codes are unpacked once for all.
template <int kFirstBits, int kBits, bool kFirst, int kN, int kM, class Operand>
__device__ __forceinline__ void multiply_codes(float (&sums)[kN][kM][4], const std::uint32_t (&words)[kBits],
                                               const Operand& operand) {
#pragma unroll
  for (int kk = 0; kk < 2; ++kk) {
    std::uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = code_pair<kFirstBits, kBits, kFirst>(words, 2 * m + i % 2, 2 * kk + i / 2);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      std::uint32_t b[2] = {operand(n, 2 * kk), operand(n, 2 * kk + 1)};
      // Of one bit, 16 share a word, and rows 8 to 15 and 24 to 31 stand 4 places higher than the others.
      if (kFirst && kBits == 1) b[1] = multiply_halves(b[1], power_pair(-4));
#pragma unroll
      for (int m = 0; m < kM; ++m) multiply_add(sums[n][m], a[m], b[0], b[1], __half());
    }
  }
}

// This does so for all planes of a block of codes. `codes` has the lane's words of the first plane in shared memory, of
// which each further one follows those before it, plane_words * 4 bytes for each of their bits.
template <int kBits, bool kRefined, int kN, int kM, class Operand>
__device__ __forceinline__ void multiply_block(float (&sums)[kN][kM][4], std::uint32_t codes, int block, int dim,
                                               int planes, bool upper, const Operand& operand) {
  const auto multiply_plane = [&]<int kOwn>(std::integral_constant<int, kOwn>) {
    std::uint32_t words[kOwn];
    load_words<kOwn, kM>(words, codes + kOwn * dim * 4 + block * kOwn * 128, upper);
    multiply_codes<kBits, kOwn, false>(
        sums, words, [&](int n, int f) { return multiply_halves(operand(n, f), power_pair(kBits - 2 * kOwn)); });
  };
  if constexpr (kRefined && kBits <= 4) multiply_plane(std::integral_constant<int, kBits>());
  if constexpr (kRefined && kBits <= 2)
    if (planes > 2) multiply_plane(std::integral_constant<int, 2 * kBits>());
  if constexpr (kRefined && kBits == 1)
    if (planes > 3) multiply_plane(std::integral_constant<int, 4>());
  std::uint32_t words[kBits];
  load_words<kBits, kM>(words, codes + block * kBits * 128, upper);
  multiply_codes<kBits, kBits, true>(sums, words, operand);
}

}  // namespace attnx::cuda
