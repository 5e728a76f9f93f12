// A window of keys or values as codes of 8 bits and ranges, and these codes as bit planes.
#pragma once

#include "../convert.h"
#include "attnx/staircase.h"

namespace attnx::cpu::ATTNX_ISA {

// The largest float16 that is not above x. Zero is +0: which of two zeros is the least depends on their order.
ATTNX_INLINE Float16 round_down(float x) {
  Float16 h = from_float<Float16>(x);
  if (to_float(h) > x) h.bits = h.bits & 0x7fff ? std::uint16_t(h.bits & 0x8000 ? h.bits + 1 : h.bits - 1) : 0x8001;
  if (!(h.bits & 0x7fff)) h.bits = 0;
  return h;
}
// The smallest float16 that is not below x >= 0.
ATTNX_INLINE Float16 round_up_half(double x) {
  Float16 h = from_float<Float16>(float(x));
  if (double(to_float(h)) < x) ++h.bits;
  return h;
}

// Quantises numbers[rows][columns] in groups of columns: codes[rows][columns], ranges[columns / group][rows][2]. In
// double, as the definition is: the same codes whatever the instruction set.
inline void quantise(const float* numbers, std::int64_t rows, std::int64_t columns, std::int64_t group,
                     std::uint8_t* codes, std::uint16_t* ranges) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; c += group) {
      const float* const x = numbers + r * columns + c;
      Vec<float> low = load(x), high = low;
      for (std::int64_t i = kLanes<float>; i < group; i += kLanes<float>) {
        const Vec<float> next = load(x + i);
        low = next < low ? next : low;
        high = next > high ? next : high;
      }
      const Float16 least = round_down(-largest_lane<float>(-low));
      const double minimum = to_float(least);
      const Float16 step = round_up_half((double(largest_lane<float>(high)) - minimum) / 256);
      std::uint16_t* const range = ranges + 2 * (c / group * rows + r);
      range[0] = least.bits, range[1] = step.bits;
      const double size = step.bits ? double(to_float(step)) : __builtin_huge_val();  // max = min: all codes 0
      std::uint8_t* const code = codes + r * columns + c;
      for (std::int64_t i = 0; i < group; ++i) {
        const double cell = (double(x[i]) - minimum) / size;
        code[i] = std::uint8_t(cell < 255 ? std::int32_t(cell) : 255);
      }
    }
  }
}

// The bits of a plane, `above` of each code coming before them, of a block of 32 x 32 codes.
inline void pack_block(const std::uint8_t* codes, std::int64_t stride, int bits, int above, std::uint32_t* words) {
  const std::uint32_t mask = (1u << bits) - 1;
  const int shift = 8 - above - bits;
  for (int word = 0; word < bits; ++word) {
    for (int t = 0; t < 4; ++t, words += 8) {
      std::uint32_t packed[8] = {};
      for (int k = word * 16 / bits; k < (word + 1) * 16 / bits; ++k) {
        for (int e = 0; e < 2; ++e) {
          const std::uint8_t* const row = codes + (k / 4 * 8 + 2 * t + e) * stride + k % 4 * 8;
          for (int g = 0; g < 8; ++g) packed[g] |= (row[g] >> shift & mask) << (16 * e + k * bits % 16);
        }
      }
      __builtin_memcpy(words, packed, sizeof packed);
    }
  }
}

}  // namespace attnx::cpu::ATTNX_ISA
