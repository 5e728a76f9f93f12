// These are the backward kernels for sm_90a over clusters of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/mainloop/sm90/backward.h"
#include "cuda/mainloop/sm90/grad_query.h"
#include "cuda/storage/gathered_async.h"
#include "cuda/tiles/clustered.h"
#include "cuda/units/routed_call.h"
#include "cuda/units/routed_grad_query.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
struct RoutedBackwardSm90 {
  template <class Tile>
  static void launch(const RoutedBackwardCall& call) {
    using Storage = GatheredAsync<Input>;
    const BackwardArguments<Clustered, Storage, Plain> args{
        call.geometry,
        call.scaling,
        call.scratch,
        {call.query, call.key, call.value, call.grad_output, call.grad_key, call.grad_value},
        call.keys};
    launch_kernel("attnx_backward_sm90", attnx_backward_sm90<Score, Clustered, Storage, Tile>, call.key_blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
    launch_kernel("attnx_grad_query_sm90",
                  attnx_grad_query_sm90<Storage, Tile, ClusterGradQueryArguments, ClusterGradQueryPlace<Tile>>,
                  call.row_blocks, 128, SharedTile<Tile::kM, Tile::kHeadDim>::kBytes, call.stream,
                  grad_query_arguments(call));
  }

  static void run(const RoutedBackwardCall& call) {
    using Sizes = TmaBackwardTiles<kHeadDim>;
    call.wide ? launch<typename Sizes::Gathered>(call) : launch<typename Sizes::GatheredNarrow>(call);
  }
};

}  // namespace attnx::cuda
