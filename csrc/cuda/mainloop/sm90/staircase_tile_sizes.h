// This is the table to tune: tile sizes of the forward over a staircase cache for sm_90a, by head dimension.
#pragma once

#include "cuda/mainloop/sm90/tile_sizes.h"

namespace attnx::cuda {

// Producers who unpack codes need registers for a block of them.
template <class Tile>
struct UnpackForwardTile : Tile {
  static constexpr int kProducerRegisters = 104, kConsumerRegisters = 200;
  static_assert(Tile::kWarpgroups == 2);
};

template <int kHeadDim>
struct StaircaseTmaForwardTiles;
template <>
struct StaircaseTmaForwardTiles<64> {
  using Tile = UnpackForwardTile<TmaForwardTile<64, 128, 128, false, 1>>;
};
template <>
struct StaircaseTmaForwardTiles<128> {
  using Tile = UnpackForwardTile<TmaForwardTile<128, 128, 128, false, 1>>;
};

}  // namespace attnx::cuda
