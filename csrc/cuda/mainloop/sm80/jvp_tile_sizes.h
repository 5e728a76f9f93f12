// These are the tile sizes of calls with tangents. A warp has 16 rows, because their sums are twice as many.
#pragma once

#include "cuda/mainloop/sm80/tile_sizes.h"

namespace attnx::cuda {

inline constexpr int kJvpRows = 64;  // of a tile

// Each tile in shared memory lies beside that of its tangents.
template <int kHeadDim, int kM, int kN, int kBlocksPerSm>
struct JvpTile : ForwardTile<kHeadDim, kM, kN, kM / 16, 1, kBlocksPerSm> {
  static constexpr int kSharedBytes = 2 * ForwardTile<kHeadDim, kM, kN, kM / 16, 1, kBlocksPerSm>::kSharedBytes;
  static_assert(kSharedBytes <= kLeastSharedBytes);
};

// Copies of single elements, where rows are not aligned, need registers of their own. The rows are as many.
template <int kHeadDim>
struct JvpTiles;
template <>
struct JvpTiles<64> {
  using Aligned = JvpTile<64, kJvpRows, 64, 2>;
  using Unaligned = Aligned;
};
template <>
struct JvpTiles<128> {
  using Aligned = JvpTile<128, kJvpRows, 32, 2>;
  using Unaligned = JvpTile<128, kJvpRows, 16, 2>;
};

}  // namespace attnx::cuda
