// This is the table to tune: tile sizes of the forward over a staircase cache, by head dimension. Tiles are unpacked by
// stores, so that a second stage would start nothing earlier. Blocks of 32 tokens x 32 channels fall to all warps
// alike.
#pragma once

#include "cuda/mainloop/sm80/tile_sizes.h"

namespace attnx::cuda {

template <int kHeadDim>
struct StaircaseForwardTiles;
template <>
struct StaircaseForwardTiles<64> {
  using Tile = ForwardTile<64, 128, 64, 4, 1, 2>;
};
template <>
struct StaircaseForwardTiles<128> {
  using Tile = ForwardTile<128, 128, 64, 4, 1, 2>;
};
template <>
struct StaircaseForwardTiles<256> {
  using Tile = ForwardTile<256, 128, 32, 8, 1, 1>;
};

}  // namespace attnx::cuda
