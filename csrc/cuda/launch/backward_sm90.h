// Launches the backward kernels for sm_90a of one score, dtype and padded head dimension; each unit of these
// instantiates one.
#pragma once

#include "cuda/launch/element.h"
#include "cuda/launch/launch.h"
#include "cuda/sm90/backward.h"

namespace attnx::cuda {

using LaunchArguments = TmaBackwardArguments;  // of this unit

template <Score kScore, DType kDType, int kHeadDim>
void launch_backward_sm90(const TmaBackwardArguments& launch_args, Variant variant, std::int64_t blocks,
                          cudaStream_t stream) {
  using Input = typename Element<kDType>::Type;
  using Tiles = TmaBackwardTiles<kHeadDim>;
  const BackwardArguments& args = launch_args.args;
  const auto launch = [&]<bool kListed, class Tile>(std::bool_constant<kListed>, Tile) {
    launch_kernel("attnx_backward_sm90",
                  reinterpret_cast<const void*>(attnx_backward_sm90<kScore, Input, kListed, Tile>), blocks,
                  Tile::kThreads, Tile::kSharedBytes, stream, launch_args);
    launch_kernel("attnx_grad_query_sm90", reinterpret_cast<const void*>(attnx_grad_query_sm90<Input, Tile>),
                  args.call.batch * args.heads.divisor() * args.query_blocks.divisor(), 128,
                  SharedTile<Tile::kM, Tile::kHeadDim>::kBytes, stream, args);
  };
  variant.listed ? launch(std::true_type(), typename Tiles::Listed())
                 : launch(std::false_type(), typename Tiles::Dense());
}

}  // namespace attnx::cuda
