// This reduces to one number for each block of keys that a list names: it makes the gradient of block_bias.
#pragma once

#include <algorithm>

#include "cuda/common/reduce.h"
#include "cuda/tiles/listed.h"

namespace attnx::cuda {

// This is the reduction policy. A thread block owns an entry of a list of keys, and walks over the tiles of its block.
class Blocks {
  static std::int64_t blocks_along(std::int64_t rows, std::int64_t size) { return (rows + size - 1) / size; }

 public:
  // Logits of a step get a bias, by which blocks differ.
  static constexpr bool kHasBias = true;
  static constexpr bool kKeysStay = false, kRowsStay = false, kCopiesLate = false;

  struct Parameters {
    BlockList key_blocks;           // of each block of queries
    int block_q, block_k;           // rows and keys of a block
    Divisor entries, query_blocks;  // of a list; of a head
    double* sums;                   // [batch, heads_q, query block, entry]
  };
  static Parameters parameters(const BackwardParams& p) {
    return {p.key_blocks,
            int(p.block_q),
            int(p.block_k),
            Divisor(std::max<std::int64_t>(p.key_blocks.width, 1)),
            Divisor(std::max<std::int64_t>(blocks_along(p.length_q, p.block_q), 1)),
            p.grad_block_bias};
  }
  // So many thread blocks there are.
  static std::int64_t blocks(const BackwardParams& p) {
    return p.batch * p.heads_q * blocks_along(p.length_q, p.block_q) * p.key_blocks.width;
  }

  template <class Tile>
  class Walk {
    int batch_, head_, query_block_, entry_;
    Sequence sequence_;
    int row_, key_, tiles_across_, tiles_;  // first row and key of the block; tiles along its keys; all of them
    float bias_, divisor_;

   public:
    template <class Args>
    __device__ __forceinline__ Walk(const Args& args, int block) {
      const auto& p = args.reduction;
      entry_ = p.entries.split(block);
      query_block_ = p.query_blocks.split(block);
      head_ = args.heads.split(block);
      batch_ = block;
      sequence_ = sequence_of(args, batch_);
      const List list(p.key_blocks, batch_, head_, query_block_);
      row_ = query_block_ * p.block_q;
      const bool listed = entry_ < list.count();
      key_ = listed ? list.index(entry_) * p.block_k : sequence_.band.length_k;
      bias_ = listed ? list.bias(entry_) : 0;
      divisor_ = listed ? list.divisor(entry_) : 1;
      const auto tiles = [](int rows, int size) { return (rows + size - 1) / size; };
      tiles_across_ = tiles(max(min(p.block_k, sequence_.band.length_k - key_), 0), Tile::kN);
      tiles_ = tiles(max(min(p.block_q, sequence_.length_q - row_), 0), Tile::kM) * tiles_across_;
      if (bias_ == -INFINITY) tiles_ = 0;  // it hides the block
    }

    __device__ __forceinline__ int end() const { return tiles_; }
    __device__ __forceinline__ int begin() const { return 0; }
    __device__ __forceinline__ int next(int step) const { return step + 1; }
    __device__ __forceinline__ int batch(int) const { return batch_; }
    __device__ __forceinline__ int head(int) const { return head_; }
    __device__ __forceinline__ const Sequence& sequence(int) const { return sequence_; }
    __device__ __forceinline__ int row(int step) const { return row_ + step / tiles_across_ * Tile::kM; }
    __device__ __forceinline__ int key(int step) const { return key_ + step % tiles_across_ * Tile::kN; }
    __device__ __forceinline__ float bias(int) const { return bias_; }
    __device__ __forceinline__ float divisor() const { return divisor_; }

    // This returns where the block's sum goes.
    template <class Args>
    __device__ __forceinline__ double* place(const Args& args) const {
      const auto& p = args.reduction;
      const std::int64_t list = (batch_ * args.heads_q + head_) * p.query_blocks.divisor() + query_block_;
      return p.sums + list * p.entries.divisor() + entry_;
    }
  };

  template <class Tile>
  class Sums {
    float sum_ = 0;

   public:
    template <bool, int kM, int kN>
    __device__ __forceinline__ void add(const float (&x)[kM][kN][4], const float (&)[kM * 2]) {
      float sum = 0;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum += x[m][n][e];
      sum_ += sum;
    }

    template <class Args>
    __device__ __forceinline__ void store(const Args& args, const Walk<Tile>& walk) const {
      const double sum = sum_of_block<Tile::kThreads>(sum_);
      if (threadIdx.x == 0) *walk.place(args) = sum / walk.divisor();
    }
  };
};

}  // namespace attnx::cuda
