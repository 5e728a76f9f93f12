// This says which tile of rows is the n-th that blocks take, whether its number or a table says where it lies.
#pragma once

#include "cuda/mainloop/forward_rows.h"
#include "cuda/mainloop/sm90/forward_arguments.h"

namespace attnx::cuda {

template <class Tiles, class Args, class Tile>
__device__ __forceinline__ auto nth_place(const Args& args, int n, Tile tile) {
  if constexpr (Tiles::kHasPlaces) {
    return Tiles::Place::of(args, n, tile);
  } else {
    return ForwardPlace::of(args, args.in_order(n), tile);
  }
}

}  // namespace attnx::cuda
