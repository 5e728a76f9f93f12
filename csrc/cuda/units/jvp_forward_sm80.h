// These are the forward kernels for sm_80 that differentiate along a direction, too, of one score, dtype and padded
// head dimension.
#pragma once

#include <type_traits>

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/sm80/forward.h"
#include "cuda/mainloop/sm80/jvp_tile_sizes.h"
#include "cuda/storage/strided.h"
#include "cuda/tangents/given.h"
#include "cuda/tiles/band.h"
#include "cuda/units/call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
class JvpForwardSm80 {
  template <bool kAligned>
  static void launch(const JvpForwardCall& call) {
    using Storage = Strided<Input, kAligned>;
    using Sizes = JvpTiles<kHeadDim>;
    using Tile = std::conditional_t<kAligned, typename Sizes::Aligned, typename Sizes::Unaligned>;
    const auto& p = call.params;
    const GivenTangents::Arguments<ForwardArguments<Score, Banded, Storage, Plain>> args{{call.geometry,
                                                                                          call.scaling,
                                                                                          Storage::tensors(p),
                                                                                          p.logsumexp,
                                                                                          Score::parameters(p),
                                                                                          Banded::parameters(p),
                                                                                          {}},
                                                                                         p.tangent_query,
                                                                                         p.tangent_key,
                                                                                         p.tangent_value,
                                                                                         p.tangent_output,
                                                                                         p.tangent_logsumexp};
    launch_kernel("attnx_forward_sm80", attnx_forward_sm80<Score, Banded, Storage, Tile, Plain, GivenTangents>,
                  call.blocks, Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }

 public:
  static void run(const JvpForwardCall& call) { call.aligned ? launch<true>(call) : launch<false>(call); }
};

}  // namespace attnx::cuda
