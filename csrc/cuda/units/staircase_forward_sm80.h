// This is the forward kernel over a staircase cache for sm_80 of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/sm80/forward.h"
#include "cuda/mainloop/sm80/staircase_tile_sizes.h"
#include "cuda/storage/staircase.h"
#include "cuda/tiles/band.h"
#include "cuda/units/call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
struct StaircaseForwardSm80 {
  static void run(const StaircaseForwardCall& call) {
    using Storage = Unpacked<Input>;
    using Tile = typename StaircaseForwardTiles<kHeadDim>::Tile;
    const auto& p = call.params;
    const ForwardArguments<Score, Banded, Storage, Plain> args{
        call.geometry, call.scaling,         Storage::tensors(p, call.variant.aligned),
        p.logsumexp,   Score::parameters(p), Banded::parameters(p),
        call.partial};
    launch_kernel("attnx_forward_sm80", attnx_forward_sm80<Score, Banded, Storage, Tile, Plain>, call.blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }
};

}  // namespace attnx::cuda
