// These are the forward kernels over clusters of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/sm80/forward.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/storage/gathered.h"
#include "cuda/tiles/clustered.h"
#include "cuda/units/routed_call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
struct RoutedForwardSm80 {
  template <bool kAligned, class Tile>
  static void launch(const RoutedForwardCall& call) {
    using Storage = Gathered<Input, kAligned>;
    const ForwardArguments<Score, Clustered, Storage, Plain> args{call.geometry,
                                                                  call.scaling,
                                                                  {call.query, call.key, call.value, call.output},
                                                                  call.logsumexp,
                                                                  Score::parameters(call.params),
                                                                  call.tiles,
                                                                  {}};
    launch_kernel("attnx_forward_sm80", attnx_forward_sm80<Score, Clustered, Storage, Tile, Plain>, call.blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }

  static void run(const RoutedForwardCall& call) {
    using Sizes = ForwardTiles<kHeadDim>;
    if (!call.aligned) {
      launch<false, typename Sizes::Wide>(call);
    } else if (call.wide) {
      launch<true, typename Sizes::Wide>(call);
    } else {
      launch<true, typename Sizes::Narrow>(call);
    }
  }
};

}  // namespace attnx::cuda
