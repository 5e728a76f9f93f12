// What the backward mainloops share: which tiles of rows see a tile of keys, and the order in which tiles of keys add
// to a tile of rows.
#pragma once

#include "cuda/score/sigmoid.h"
#include "cuda/score/softmax.h"
#include "cuda/tile.h"
#include "cuda/tiles/band.h"
#include "cuda/tiles/listed.h"

namespace attnx::cuda {

template <Score kScore, class Input>
using BackwardScore = std::conditional_t<kScore == Score::kSoftmax, SoftmaxBackward, SigmoidBackward<Input>>;

// The tiles of rows that see a tile of keys.
template <int kRows>
class BandRowTiles {
  int begin_, end_;

 public:
  static constexpr bool kHasBias = false;

  __device__ __forceinline__ BandRowTiles(const Band& band, int first_key, int keys, int length_q, int group) {
    const Visible queries = band.seen_by(first_key, first_key + keys, length_q);
    begin_ = queries.first * group / kRows;
    end_ = max((queries.end * group + kRows - 1) / kRows, begin_);
  }
  __device__ __forceinline__ int begin() const { return begin_; }
  __device__ __forceinline__ int end() const { return end_; }
  __device__ __forceinline__ int row(int tile) const { return tile * kRows; }
  __device__ __forceinline__ float bias(int) const { return 0; }
  __device__ __forceinline__ const std::int32_t* entry(int) const { return nullptr; }
};

// How many tiles of kKeys keys add to the tile of rows from row_begin on before the tile from key_begin on does: all
// that its first query sees up to there, or its list names, which is this entry of the keys' own list.
template <bool kListed, int kKeys>
__device__ __forceinline__ int tiles_before(const BackwardArguments& args, const Band& band, int row_begin,
                                            int key_begin, const std::int32_t* entry) {
  if constexpr (kListed) {
    const int per_block = fresh(int(args.call.block_k)) / kKeys;  // not kept in a register through the loop
    return args.list_order[entry - args.call.query_blocks.indices] * per_block + key_begin / kKeys % per_block;
  } else {
    return (key_begin - band.visible(args.group.divide(row_begin)).first / kKeys * kKeys) / kKeys;
  }
}

// Stores a warp's accumulators, rounded, as rows of a tile from (row, column) on; lane is the warp's.
template <class Tile, class Input, int kStride = 1, int kM, int kN>
__device__ __forceinline__ void store_accumulators(std::uint32_t tile, int row, int column, int lane,
                                                   const float (&x)[kM][kN][4], float factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int chunk = column / 8 + n / 2 * 2 * kStride + n % 2;
        store_shared(tile + Tile::offset(row + m * 16 + half * 8 + lane / 4, chunk) + lane % 4 * 4,
                     pack(x[m][n][half * 2] * factor, x[m][n][half * 2 + 1] * factor, Input()));
      }
}

// One thread: waits until `before` turns at a tile of rows have been taken.
__device__ __forceinline__ void wait_for_turn(const int* turns, int before) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(turns) : "memory");
  } while (seen < before);
}

}  // namespace attnx::cuda
