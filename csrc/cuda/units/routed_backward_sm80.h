// These are the backward kernels over clusters of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/mainloop/sm80/backward.h"
#include "cuda/mainloop/sm80/grad_query.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/storage/gathered.h"
#include "cuda/tiles/clustered.h"
#include "cuda/units/routed_call.h"

namespace attnx::cuda {

struct ClusterGradQueryArguments : GradQueryArguments {
  ClusterTable tiles;  // of rows
};

// This says which tile of rows a block makes, as GradQueryPlace does.
template <class Tile>
struct ClusterGradQueryPlace {
  int head, batch;
  ClusterSequence sequence;
  int row_begin, row_end;
  std::int64_t row_tile;

  static __device__ __forceinline__ ClusterGradQueryPlace of(const ClusterGradQueryArguments& args, int block) {
    const ClusterPlace place = ClusterPlace::of(args, block, Tile());
    return {place.head, place.batch, place.sequence, place.row_begin, place.row_end, block};
  }
};

template <class Score, class Input, int kHeadDim>
struct RoutedBackwardSm80 {
  template <bool kAligned, class Tile>
  static void launch(const RoutedBackwardCall& call) {
    using Storage = Gathered<Input, kAligned>;
    const BackwardArguments<Clustered, Storage> args{
        call.geometry,
        call.scaling,
        call.scratch,
        {call.query, call.key, call.value, call.grad_output, call.grad_key, call.grad_value},
        call.keys};
    launch_kernel("attnx_backward_sm80", attnx_backward_sm80<Score, Clustered, Storage, Tile>, call.key_blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
    const ClusterGradQueryArguments grad_query{
        {call.geometry, call.scaling.scale, call.scratch.grad_query_sum, call.grad_query, {}}, call.rows};
    launch_kernel(
        "attnx_grad_query_sm80",
        attnx_grad_query_sm80<Gathered<Input, true>, Tile, ClusterGradQueryArguments, ClusterGradQueryPlace<Tile>>,
        call.row_blocks, Tile::kThreads, SharedTile<Tile::kM, Tile::kHeadDim>::kBytes, call.stream, grad_query);
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
