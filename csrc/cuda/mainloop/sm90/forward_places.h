// This says which tiles of rows blocks that stay take, in their order, whether numbers or a table say where they lie.
#pragma once

#include "cuda/mainloop/forward_rows.h"
#include "cuda/mainloop/sm90/forward_arguments.h"

namespace attnx::cuda {

template <class Tiles, class Args>
__device__ __forceinline__ int row_tiles_of(const Args& args) {
  if constexpr (Tiles::kHasPlaces) {
    return Tiles::row_tiles(args);
  } else {
    return args.row_tiles;
  }
}
template <class Tiles, class Args, class Tile>
__device__ __forceinline__ auto nth_place(const Args& args, int n, Tile tile) {
  if constexpr (Tiles::kHasPlaces) {
    return Tiles::Place::of(args, n, tile);
  } else {
    return ForwardPlace::of(args, args.in_order(n), tile);
  }
}

}  // namespace attnx::cuda
