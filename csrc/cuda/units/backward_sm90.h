// These are the backward kernels for sm_90a of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/mainloop/sm90/backward.h"
#include "cuda/storage/tma.h"
#include "cuda/tiles/band.h"
#include "cuda/tiles/listed.h"
#include "cuda/units/call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
struct BackwardSm90 {
  template <class Tiles, class Tile>
  static void launch(const BackwardCall& call) {
    using Storage = Tma<Input>;
    const BackwardArguments<Tiles, Storage, Plain> args{
        call.geometry, call.scaling, call.scratch,
        Storage::tensors(call.params, call.geometry.group.divisor(), Tile::kM, Tile::kN),
        Tiles::parameters(call.params, call.list_order)};
    launch_kernel("attnx_backward_sm90", attnx_backward_sm90<Score, Tiles, Storage, Tile>, call.blocks, Tile::kThreads,
                  Tile::kSharedBytes, call.stream, args);
  }

  static void run(const BackwardCall& call) {
    using Sizes = TmaBackwardTiles<kHeadDim>;
    if (!call.variant.listed) return launch<Banded, typename Sizes::Dense>(call);
    if constexpr (!Score::kBandOnly)
      Sizes::Listed::choose(call.variant.block_q, call.variant.block_k,
                            [&]<class Tile>(Tile) { launch<Listed, Tile>(call); });
  }
};

}  // namespace attnx::cuda
