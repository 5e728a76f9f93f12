// These are the tile sizes of calls with tangents. A warp has 16 rows, because their sums are twice as many.
#pragma once

#include "cuda/mainloop/sm80/tile_sizes.h"

namespace attnx::cuda {

// Each tile in shared memory lies beside that of its tangents.
template <int kHeadDim, int kM, int kN, int kBlocksPerSm>
struct JvpTile : ForwardTile<kHeadDim, kM, kN, kM / 16, 1, kBlocksPerSm> {
  static constexpr int kSharedBytes = 2 * ForwardTile<kHeadDim, kM, kN, kM / 16, 1, kBlocksPerSm>::kSharedBytes;
  static_assert(kSharedBytes <= kLeastSharedBytes);
};

template <int kHeadDim>
struct JvpTiles;
template <>
struct JvpTiles<64> {
  using Tile = JvpTile<64, 64, 64, 2>;
};
template <>
struct JvpTiles<128> {
  using Tile = JvpTile<128, 64, 32, 2>;
};

}  // namespace attnx::cuda
