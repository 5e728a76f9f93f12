// This is the forward kernel over a staircase cache for sm_90a of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/sm90/forward.h"
#include "cuda/mainloop/sm90/staircase_tile_sizes.h"
#include "cuda/storage/staircase_async.h"
#include "cuda/tiles/band.h"
#include "cuda/units/call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
struct StaircaseForwardSm90 {
  static void run(const StaircaseForwardCall& call) {
    using Storage = UnpackedAsync<Input>;
    using Tile = typename StaircaseTmaForwardTiles<kHeadDim>::Tile;
    const auto& p = call.params;
    const PersistentForwardArguments<Score, Banded, Storage, Plain> args{
        {call.geometry, call.scaling, Storage::tensors(p, call.variant.aligned), p.logsumexp, Score::parameters(p),
         Banded::parameters(p), call.partial},
        call.schedule};
    launch_kernel("attnx_forward_sm90", attnx_forward_sm90<Score, Banded, Storage, Tile, Plain>, call.blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }
};

}  // namespace attnx::cuda
