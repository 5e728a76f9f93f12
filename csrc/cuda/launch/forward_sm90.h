// Launches the forward kernel for sm_90a of one score, dtype and padded head dimension; each unit of these instantiates
// one.
#pragma once

#include "cuda/launch/element.h"
#include "cuda/launch/launch.h"
#include "cuda/sm90/forward.h"

namespace attnx::cuda {

using LaunchArguments = TmaForwardArguments;  // of this unit

template <Score kScore, DType kDType, int kHeadDim>
void launch_forward_sm90(const TmaForwardArguments& args, Variant variant, std::int64_t blocks, cudaStream_t stream) {
  using Tiles = TmaForwardTiles<kHeadDim>;
  const auto launch = [&]<bool kListed, class Tile>(std::bool_constant<kListed>, Tile) {
    launch_kernel(
        "attnx_forward_sm90",
        reinterpret_cast<const void*>(attnx_forward_sm90<kScore, typename Element<kDType>::Type, kListed, Tile>),
        blocks, Tile::kThreads, Tile::kSharedBytes, stream, args);
  };
  variant.listed ? launch(std::true_type(), typename Tiles::Listed())
                 : launch(std::false_type(), typename Tiles::Dense());
}

}  // namespace attnx::cuda
