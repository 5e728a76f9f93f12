// This keeps a number for each pair of a query and a key.
#pragma once

#include "cuda/common/logits.h"
#include "cuda/reduction/pair_sums.h"

namespace attnx::cuda {

// This is the reduction policy. A thread block owns a tile of rows and keys, which is all that it visits.
struct Pairs {
  static constexpr bool kHasBias = false, kKeysStay = false, kRowsStay = false, kCopiesLate = false;

  struct Parameters {
    Divisor row_blocks, key_blocks;  // tiles along the rows and keys
    float* numbers;                  // [batch, heads_q, query, key]
  };

  template <class Tile>
  class Walk {
    int batch_, head_, row_, key_;
    Sequence sequence_;

   public:
    template <class Args>
    __device__ __forceinline__ Walk(const Args& args, int block) {
      batch_ = block;
      key_ = args.reduction.key_blocks.split(batch_) * Tile::kN;
      row_ = args.reduction.row_blocks.split(batch_) * Tile::kM;
      head_ = args.heads.split(batch_);
      sequence_ = sequence_of(args, batch_);
    }

    // A tile that no row sees is all zeros.
    __device__ __forceinline__ int end() const {
      const Visible queries = sequence_.band.seen_by(key_, key_ + Tile::kN, sequence_.length_q);
      return queries.first < row_ + Tile::kM && queries.end > row_;
    }
    __device__ __forceinline__ int begin() const { return 0; }
    __device__ __forceinline__ int next(int step) const { return step + 1; }
    __device__ __forceinline__ int batch(int) const { return batch_; }
    __device__ __forceinline__ int head(int) const { return head_; }
    __device__ __forceinline__ const Sequence& sequence(int) const { return sequence_; }
    __device__ __forceinline__ int row(int) const { return row_; }
    __device__ __forceinline__ int key(int) const { return key_; }
  };

  template <class Tile>
  class Sums : public PairSums<Tile> {
   public:
    template <class Args>
    __device__ __forceinline__ void store(const Args& args, const Walk<Tile>& walk) const {
      const Sequence& sequence = walk.sequence(0);
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      const int row = walk.row(0) + warp % Tile::kRowWarps * Tile::kWarpRows + lane / 4;
      const int key = walk.key(0) + warp / Tile::kRowWarps * Tile::kWarpKeys + lane % 4 * 2;
      const std::int64_t head = walk.batch(0) * args.heads_q + walk.head(0);
#pragma unroll
      for (int r = 0; r < Tile::kWarpRows / 8; ++r) {
        if (row + row_of(r) >= sequence.length_q) break;
        float* const to = args.reduction.numbers + (head * args.length_q + row + row_of(r)) * args.length_k;
#pragma unroll
        for (int n = 0; n < Tile::kWarpKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (key + n * 8 + e < sequence.band.length_k) to[key + n * 8 + e] = this->sums_[r / 2][n][r % 2 * 2 + e];
      }
    }
  };
};

}  // namespace attnx::cuda
