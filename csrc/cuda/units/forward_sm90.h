// These are the forward kernels for sm_90a of one score, dtype and padded head dimension, and of logits of one kind.
#pragma once

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/sm90/forward.h"
#include "cuda/mainloop/sm90/tile_sizes.h"
#include "cuda/storage/tma.h"
#include "cuda/tiles/band.h"
#include "cuda/tiles/listed.h"
#include "cuda/units/call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim, class Logits = Plain, class Sizes = TmaForwardTiles<kHeadDim>>
struct ForwardSm90 {
  template <class Tiles, class Tile>
  static void launch(const ForwardCall& call) {
    using Storage = Tma<Input>;
    constexpr int kWarpRows = 16;  // rows that leave together
    const auto& p = call.params;
    const PersistentForwardArguments<Score, Tiles, Storage, Logits> args{
        {call.geometry, Logits::arguments(call.scaling, p),
         Storage::tensors(p, call.geometry.group.divisor(), Tile::kM, Tile::kN, kWarpRows), p.logsumexp,
         Score::parameters(p), Tiles::parameters(p), call.partial},
        call.schedule};
    launch_kernel("attnx_forward_sm90", attnx_forward_sm90<Score, Tiles, Storage, Tile, Logits>, call.blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }

  static void run(const ForwardCall& call) {
    if (!call.variant.listed) return launch<Banded, typename Sizes::Dense>(call);
    if constexpr (!Score::kBandOnly)
      Sizes::Listed::choose(call.variant.block_q, call.variant.block_k,
                            [&]<class Tile>(Tile) { launch<Listed, Tile>(call); });
  }
};

}  // namespace attnx::cuda
