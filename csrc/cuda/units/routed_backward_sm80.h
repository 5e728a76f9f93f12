// These are the backward kernels over clusters of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/sm80/backward.h"
#include "cuda/mainloop/sm80/grad_query.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/storage/gathered.h"
#include "cuda/tiles/clustered.h"
#include "cuda/units/routed_call.h"
#include "cuda/units/routed_grad_query.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
struct RoutedBackwardSm80 {
  template <bool kAligned, class Tile>
  static void launch(const RoutedBackwardCall& call) {
    using Storage = Gathered<Input, kAligned>;
    const BackwardArguments<Clustered, Storage, Plain> args{
        call.geometry,
        call.scaling,
        call.scratch,
        {call.query, call.key, call.value, call.grad_output, call.grad_key, call.grad_value},
        call.keys};
    launch_kernel("attnx_backward_sm80", attnx_backward_sm80<Score, Clustered, Storage, Tile, Plain>, call.key_blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
    launch_kernel(
        "attnx_grad_query_sm80",
        attnx_grad_query_sm80<Gathered<Input, true>, Tile, ClusterGradQueryArguments, ClusterGradQueryPlace<Tile>>,
        call.row_blocks, Tile::kThreads, SharedTile<Tile::kM, Tile::kHeadDim>::kBytes, call.stream,
        grad_query_arguments(call));
  }

  static void run(const RoutedBackwardCall& call) {
    using Sizes = BackwardTiles<kHeadDim>;
    if (!call.aligned) {
      launch<false, typename Sizes::Narrow>(call);
    } else if (call.wide) {
      launch<true, typename Sizes::Wide>(call);
    } else {
      launch<true, typename Sizes::Narrow>(call);
    }
  }
};

}  // namespace attnx::cuda
