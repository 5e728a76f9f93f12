// This sums over the rows of a query head: a number for each key.
#pragma once

#include "attnx/weights_params.h"
#include "cuda/common/reduce.h"
#include "cuda/common/sequence.h"

namespace attnx::cuda {

// This is the reduction policy. A thread block owns a tile of keys, and walks over the tiles of rows that see it. Under
// a causal mask the first keys have the most rows, and go first.
struct Keys {
  static constexpr bool kHasBias = false;
  // These say that all steps have the same keys, or the same rows, and that a step copies its own tiles when it begins:
  // the code then has the copy in one place, where others copy the next step's.
  static constexpr bool kKeysStay = true, kRowsStay = false, kCopiesLate = false;

  struct Parameters {
    Divisor key_blocks;  // tiles along the keys
    float* sums;         // [batch, heads_q, key]
  };

  template <class Tile>
  class Walk {
    int batch_, head_, key_, row_, steps_;
    Sequence sequence_;

   public:
    template <class Args>
    __device__ __forceinline__ Walk(const Args& args, int block) {
      batch_ = block;
      key_ = args.reduction.key_blocks.split(batch_) * Tile::kN;
      head_ = args.heads.split(batch_);
      sequence_ = sequence_of(args, batch_);
      const Visible queries = sequence_.band.seen_by(key_, key_ + Tile::kN, sequence_.length_q);
      row_ = queries.first;
      steps_ = max((queries.end - row_ + Tile::kM - 1) / Tile::kM, 0);
    }

    __device__ __forceinline__ int end() const { return steps_; }
    __device__ __forceinline__ int begin() const { return 0; }
    __device__ __forceinline__ int next(int step) const { return step + 1; }
    __device__ __forceinline__ int batch(int) const { return batch_; }
    __device__ __forceinline__ int head(int) const { return head_; }
    __device__ __forceinline__ const Sequence& sequence(int) const { return sequence_; }
    __device__ __forceinline__ int row(int step) const { return row_ + step * Tile::kM; }
    __device__ __forceinline__ int key(int) const { return key_; }
  };

  // Warps stand along the keys alone, so that none shares a key with another.
  template <class Tile>
  class Sums {
    static_assert(Tile::kRowWarps == 1);
    float sums_[Tile::kWarpKeys / 8][2] = {};

   public:
    template <bool kHasFactor, int kM, int kN>
    __device__ __forceinline__ void add(const float (&x)[kM][kN][4], const float (&factor)[kM * 2]) {
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int r = 0; r < kM * 2; ++r) {
            const float own = x[r / 2][n][r % 2 * 2 + e];
            sums_[n][e] = kHasFactor ? fmaf(own, factor[r], sums_[n][e]) : sums_[n][e] + own;
          }
    }

    template <class Args>
    __device__ __forceinline__ void store(const Args& args, const Walk<Tile>& walk) const {
      const int length = walk.sequence(0).band.length_k, lane = threadIdx.x % 32;
      const int key = walk.key(0) + threadIdx.x / 32 * Tile::kWarpKeys + lane % 4 * 2;
      float* const to = args.reduction.sums + (walk.batch(0) * args.heads_q + walk.head(0)) * args.length_k;
#pragma unroll
      for (int n = 0; n < Tile::kWarpKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float sum = sum_of_column(sums_[n][e]);
          if (lane / 4 == 0 && key + n * 8 + e < length) to[key + n * 8 + e] = sum;
        }
    }
  };
};

}  // namespace attnx::cuda
