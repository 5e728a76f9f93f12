// This draws which weights of a tile dropout keeps, as attnx/dropout.h defines it.
#pragma once

#include "attnx/dropout.h"
#include "cuda/common/logits.h"

namespace attnx::cuda {

// This spreads the highest bits of four bytes: each four bits of `bytes` name the byte whose highest bit fills a byte
// of the result (PTX ISA, prmt).
template <std::uint32_t kBytes>
__device__ __forceinline__ std::uint32_t spread(std::uint32_t x) {
  std::uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "n"(kBytes | 0x8888));
  return y;
}

// These are the weights that a thread holds, in kM blocks of 16 rows and kN blocks of 8 keys.
template <int kM, int kN>
class KeptWeights {
  static_assert(kN == 2 || kN == 4 || kN % 8 == 0);
  static constexpr int kWords = kN / 2;
  // The highest bit of a byte tells whether a weight is kept. The bytes are in the order of the draw.
  std::uint32_t kept_[kM * 2][kWords];

  // This tells of each byte of x, in its highest bit, whether it is below 256 - y, y having four equal bytes: whether
  // x + y has no carry. Of the three highest bits that are added, the third comes from the lower ones' sum.
  static __device__ __forceinline__ std::uint32_t without_carry(std::uint32_t x, std::uint32_t y) {
    constexpr std::uint32_t kLower = 0x7f7f7f7f;
    const std::uint32_t z = (x & kLower) + (y & kLower);
    return ~((x & y) | (x & z) | (y & z));
  }

 public:
  __device__ __forceinline__ void keep_all() {
#pragma unroll
    for (int r = 0; r < kM * 2; ++r)
#pragma unroll
      for (int i = 0; i < kWords; ++i) kept_[r][i] = ~0u;
  }

  // `head` counts over the batch; row and key are the thread's first.
  __device__ __forceinline__ void draw(DropoutDraw draw, std::uint32_t bytes_kept, int head, int row, int key) {
    const std::uint32_t above = (256 - bytes_kept) * 0x01010101;
    const int first = key % 64 / 16;
#pragma unroll
    for (int r = 0; r < kM * 2; ++r) {
      const auto draw_keys = [&](int of_64) {
        return draw.bytes(head, row + row_of(r), key / 64 + of_64, key % 8 / 2);
      };
      if constexpr (kWords % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
          const auto [word] = draw_keys(i / 4);
#pragma unroll
          for (int j = 0; j < 4; ++j) kept_[r][i + j] = without_carry(word[j], above);
        }
      } else {
        const auto [word] = draw_keys(0);
        if constexpr (kWords == 2) {
#pragma unroll
          for (int i = 0; i < 2; ++i) kept_[r][i] = without_carry(first < 2 ? word[i] : word[2 + i], above);
        } else {
          const std::uint32_t low = first % 2 ? word[1] : word[0], high = first % 2 ? word[3] : word[2];
          kept_[r][0] = without_carry(first < 2 ? low : high, above);
        }
      }
    }
  }

  // This returns a packed pair of 16-bit weights, of row r and block n of keys, with 0 in place of what is dropped.
  __device__ __forceinline__ std::uint32_t of_pair(std::uint32_t weights, int r, int n) const {
    const std::uint32_t kept = kept_[r][n / 2];
    return weights & (n % 2 ? spread<0x3322>(kept) : spread<0x1100>(kept));
  }
  __device__ __forceinline__ float of_one(float weight, int r, int n, int e) const {
    const std::uint32_t kept = kept_[r][n / 2];
    const std::uint32_t low = n % 2 ? spread<0x2222>(kept) : spread<0x0000>(kept);
    const std::uint32_t high = n % 2 ? spread<0x3333>(kept) : spread<0x1111>(kept);
    return __uint_as_float(__float_as_uint(weight) & (e ? high : low));
  }
};

}  // namespace attnx::cuda
