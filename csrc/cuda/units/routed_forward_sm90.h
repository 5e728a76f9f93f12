// This is the forward kernel over clusters for sm_90a of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/sm90/forward.h"
#include "cuda/mainloop/sm90/tile_sizes.h"
#include "cuda/storage/gathered_async.h"
#include "cuda/tiles/clustered.h"
#include "cuda/units/routed_call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
struct RoutedForwardSm90 {
  static void run(const RoutedForwardCall& call) {
    using Storage = GatheredAsync<Input>;
    using Tile = typename TmaForwardTiles<kHeadDim>::Gathered;
    const PersistentForwardArguments<Score, Clustered, Storage, Plain> args{
        {call.geometry,
         call.scaling,
         {call.query, call.key, call.value, call.output},
         call.logsumexp,
         Score::parameters(call.params),
         call.tiles,
         {}},
        call.schedule};
    launch_kernel("attnx_forward_sm90", attnx_forward_sm90<Score, Clustered, Storage, Tile, Plain>, call.blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }
};

}  // namespace attnx::cuda
