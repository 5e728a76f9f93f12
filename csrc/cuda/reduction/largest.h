// This finds the largest logit of each row.
#pragma once

#include "cuda/common/logits.h"
#include "cuda/common/reduce.h"

namespace attnx::cuda {

// This is the reduction policy. A thread block owns a tile of rows, and walks over the tiles of keys that they see.
struct Largest {
  static constexpr bool kHasBias = false, kKeysStay = false, kRowsStay = true, kCopiesLate = false;

  struct Parameters {
    Divisor row_blocks;  // tiles along the rows
    float* largest;      // [batch, heads_q, query]
  };

  template <class Tile>
  class Walk {
    int batch_, head_, row_, key_, steps_;
    Sequence sequence_;

   public:
    template <class Args>
    __device__ __forceinline__ Walk(const Args& args, int block) {
      batch_ = block;
      row_ = args.reduction.row_blocks.split(batch_) * Tile::kM;
      head_ = args.heads.split(batch_);
      sequence_ = sequence_of(args, batch_);
      const Band& band = sequence_.band;
      key_ = band.visible(row_).first / 16 * 16;  // where draws for several keys begin, and numbers of pairs
      steps_ =
          max((band.visible(min(row_ + Tile::kM, sequence_.length_q) - 1).end - key_ + Tile::kN - 1) / Tile::kN, 0);
    }

    __device__ __forceinline__ int end() const { return steps_; }
    __device__ __forceinline__ int begin() const { return 0; }
    __device__ __forceinline__ int next(int step) const { return step + 1; }
    __device__ __forceinline__ int batch(int) const { return batch_; }
    __device__ __forceinline__ int head(int) const { return head_; }
    __device__ __forceinline__ const Sequence& sequence(int) const { return sequence_; }
    __device__ __forceinline__ int row(int) const { return row_; }
    __device__ __forceinline__ int key(int step) const { return key_ + step * Tile::kN; }
  };

  // Warps stand along the rows alone, so that none shares a row with another.
  template <class Tile>
  class Sums {
    static_assert(Tile::kKeyWarps == 1);
    static constexpr int kRows = Tile::kWarpRows / 8;
    float largest_[kRows];

   public:
    __device__ __forceinline__ Sums() {
#pragma unroll
      for (float& x : largest_) x = -INFINITY;
    }

    template <bool, int kM, int kN>
    __device__ __forceinline__ void add(const float (&x)[kM][kN][4], const float (&)[kM * 2]) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int n = 0; n < kN; ++n)
          largest_[r] = fmaxf(largest_[r], fmaxf(x[r / 2][n][r % 2 * 2], x[r / 2][n][r % 2 * 2 + 1]));
    }

    template <class Args>
    __device__ __forceinline__ void store(const Args& args, const Walk<Tile>& walk) const {
      const int lane = threadIdx.x % 32;
      const int row = walk.row(0) + threadIdx.x / 32 * Tile::kWarpRows + lane / 4;
      float* const to = args.reduction.largest + (walk.batch(0) * args.heads_q + walk.head(0)) * args.length_q;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float largest = max_of_quad(largest_[r]) * kLn2;
        if (lane % 4 == 0 && row + row_of(r) < walk.sequence(0).length_q) to[row + row_of(r)] = largest;
      }
    }
  };
};

}  // namespace attnx::cuda
