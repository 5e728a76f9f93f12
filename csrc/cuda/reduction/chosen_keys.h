// This finds the key of the largest logit of each row, or of the largest after each got a draw.
#pragma once

#include "attnx/gumbel.h"
#include "cuda/reduction/largest.h"

namespace attnx::cuda {

// This is a draw of attnx/gumbel.h times log2(e), -log2(-ln(1 - u)), with an error below 2^-18: the logarithm of small
// u is a sum of powers, as that of a number next to 1 is not exact enough.
__device__ __forceinline__ float gumbel_log2(std::uint32_t word) {
  const float u = fminf((float(int(word >> 1)) + 0.5f) * kUniformStep, kUniformMost);
  float powers = fmaf(u, 1.f / 6, 1.f / 5);
  powers = fmaf(u, powers, 1.f / 4);
  powers = fmaf(u, powers, 1.f / 3);
  powers = fmaf(u, powers, 1.f / 2);
  return -log2_approx(u < 1.f / 16 ? fmaf(u * u, powers, u) : -kLn2 * log2_approx(1 - u));
}

// This is the reduction policy. A thread block owns a tile of rows, as for the largest logits themselves.
struct ChosenKeys {
  static constexpr bool kHasBias = false, kKeysStay = false, kRowsStay = true, kCopiesLate = false;

  struct Parameters {
    Divisor row_blocks;  // tiles along the rows
    std::int64_t* keys;  // [batch, heads_q, query]
    float temperature;   // 0: nothing is drawn
    const std::int64_t *seed, *offset;
  };

  template <class Tile>
  using Walk = Largest::Walk<Tile>;

  template <class Tile>
  class Sums {
    static_assert(Tile::kKeyWarps == 1);
    static constexpr int kRows = Tile::kWarpRows / 8;
    float largest_[kRows];
    int key_[kRows];

   public:
    __device__ __forceinline__ Sums() {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        largest_[r] = -INFINITY;
        key_[r] = -1;
      }
    }

    // The loop goes over groups of 16 keys, which move to the front one after the other, so that the code of a draw,
    // which is long, is there once for a row.
    template <int kM, int kN, class Args>
    __device__ __forceinline__ void add_step(float (&x)[kM][kN][4], const Args& args, const Walk<Tile>& walk,
                                             int step) {
      static_assert(kN % 2 == 0);
      const int lane = threadIdx.x % 32, head = walk.batch(step) * int(args.heads_q) + walk.head(step);
      const int first_row = walk.row(step) + threadIdx.x / 32 * Tile::kWarpRows + lane / 4;
      const int first_key = walk.key(step) + lane % 4 * 2;
      const float temperature = args.reduction.temperature;
      GumbelDraw draw;
      if (temperature != 0)
        draw = {std::uint64_t(__ldg(args.reduction.seed)), std::uint32_t(__ldg(args.reduction.offset))};
#pragma unroll 1
      for (int key = first_key; key < first_key + kN * 8; key += 16) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float drawn[4] = {};
          if (temperature != 0) {
            const auto [words] = draw.words(head, first_row + row_of(r), key / 16, key % 8 / 2);
#pragma unroll
            for (int i = 0; i < 4; ++i) drawn[i] = temperature * gumbel_log2(words[i]);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float logit = x[r / 2][i / 2][r % 2 * 2 + i % 2] + drawn[i];
            if (logit > largest_[r]) {  // of equals the first stays, and NaN is no larger than any
              largest_[r] = logit;
              key_[r] = key + i / 2 * 8 + i % 2;
            }
          }
        }
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int n = 2; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[m][n - 2][e] = x[m][n][e];
      }
    }

    template <class Args>
    __device__ __forceinline__ void store(const Args& args, const Walk<Tile>& walk) {
      const int lane = threadIdx.x % 32;
      const int row = walk.row(0) + threadIdx.x / 32 * Tile::kWarpRows + lane / 4;
      std::int64_t* const to = args.reduction.keys + (walk.batch(0) * args.heads_q + walk.head(0)) * args.length_q;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // Four lanes share a row.
#pragma unroll
        for (int i = 1; i < 4; i *= 2) {
          const float largest = __shfl_xor_sync(~0u, largest_[r], i);
          const int key = __shfl_xor_sync(~0u, key_[r], i);
          if (largest > largest_[r] || (largest == largest_[r] && key < key_[r])) {
            largest_[r] = largest;
            key_[r] = key;
          }
        }
        if (lane % 4 == 0 && row + row_of(r) < walk.sequence(0).length_q) to[row + row_of(r)] = key_[r];
      }
    }
  };
};

}  // namespace attnx::cuda
