// These are the backward kernels for sm_80 of one score, dtype and padded head dimension, and of logits of one kind.
#pragma once

#include <type_traits>

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/sm80/backward.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/storage/strided_either.h"
#include "cuda/tiles/band.h"
#include "cuda/tiles/listed.h"
#include "cuda/units/call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim, class Logits = Plain, class Sizes = BackwardTiles<kHeadDim>>
struct BackwardSm80 {
  // There are many kernels of logits with terms already. One of narrow tiles serves rows that are aligned and others.
  template <bool kAligned, class Tile>
  using StorageOf = std::conditional_t<Logits::kEveryTile && std::is_same_v<Tile, typename Sizes::Narrow>,
                                       StridedEither<Input>, Strided<Input, kAligned>>;

  template <class Tiles, bool kAligned, class Tile>
  static void launch(const BackwardCall& call) {
    using Storage = StorageOf<kAligned, Tile>;
    const BackwardArguments<Tiles, Storage, Logits> args{call.geometry, Logits::arguments(call.scaling, call.params),
                                                         call.scratch, Storage::tensors(call.params),
                                                         Tiles::parameters(call.params, call.list_order)};
    launch_kernel("attnx_backward_sm80", attnx_backward_sm80<Score, Tiles, Storage, Tile, Logits>, call.blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }

  static void run(const BackwardCall& call) {
    if (call.variant.listed) {
      if constexpr (Logits::kHasLists && !Score::kBandOnly) {
        if (!call.variant.aligned) return launch<Listed, false, typename Sizes::Narrow>(call);
        call.variant.wide ? launch<Listed, true, typename Sizes::WideListed>(call)
                          : launch<Listed, true, typename Sizes::Narrow>(call);
      }
    } else if (!call.variant.aligned) {
      launch<Banded, false, typename Sizes::Narrow>(call);
    } else if (call.variant.wide) {
      launch<Banded, true, typename Sizes::Wide>(call);
    } else if constexpr (Sizes::Wide::kSharedBytes > kLeastSharedBytes ||
                         std::is_same_v<typename Sizes::Wide, typename Sizes::Narrow>) {
      launch<Banded, true, typename Sizes::Narrow>(call);
    }
  }
};

}  // namespace attnx::cuda
