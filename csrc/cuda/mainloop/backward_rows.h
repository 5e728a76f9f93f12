// The backward mainloops share this: which keys a tile holds, the store of their results, and the turns in which tiles
// of keys add to a tile of rows.
#pragma once

#include "cuda/common/sequence.h"
#include "cuda/common/tile.h"
#include "cuda/mainloop/backward_arguments.h"

namespace attnx::cuda {

// This says which tile of keys a block owns.
struct KeyPlace {
  int key_begin, head, batch;
  Sequence sequence;

  template <class Tile>
  static __device__ __forceinline__ KeyPlace of(const BackwardGeometry& args, int block, Tile) {
    KeyPlace place;
    place.key_begin = args.key_blocks.split(block) * Tile::kN;
    place.head = args.key_heads.split(block);
    place.batch = block;
    place.sequence = sequence_of(args, place.batch);
    return place;
  }
};

// Some tiles policies have places of their own.
template <class Tiles, bool kHasPlaces = Tiles::kHasPlaces>
struct KeyPlaceOf {
  using Type = KeyPlace;
};
template <class Tiles>
struct KeyPlaceOf<Tiles, true> {
  using Type = typename Tiles::KeyPlace;
};

// This stores a warp's accumulators, rounded, as rows of a tile from (row, column) on; lane is the warp's.
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

// This tells whether the weights of a tile may count divided by a number of its own. No list has one of normalised
// weights.
template <class Score, class Tiles>
inline constexpr bool kDivided = Tiles::kHasBias && !Score::kNormalised;

// A warp's accumulators, times a factor, get what rows of float32 add to them. They begin with a row, of those up to
// `end`, and a column; transposed, their rows are columns.
template <bool kTransposed = false, int kStride = 1, class Rows, int kM, int kN>
__device__ __forceinline__ void add_rows(float (&x)[kM][kN][4], float factor, const Rows& rows, int row, int end,
                                         int column, int features, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int down = m * 16 + e / 2 * 8 + lane / 4;
        const int across = n / 2 * 16 * kStride + n % 2 * 8 + lane % 4 * 2 + e % 2;
        const int r = row + (kTransposed ? across : down), c = column + (kTransposed ? down : across);
        x[m][n][e] = fmaf(x[m][n][e], factor, r < end && c < features ? __ldg(rows.at(r) + c) : 0.0f);
      }
}

// One thread waits until `before` turns at a tile of rows have been taken.
__device__ __forceinline__ void wait_for_turn(const int* turns, int before) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(turns) : "memory");
  } while (seen < before);
}

}  // namespace attnx::cuda
