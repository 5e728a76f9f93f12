// Launches the backward kernels of one score, dtype and padded head dimension; each unit of these instantiates one.
#pragma once

#include "cuda/launch/element.h"
#include "cuda/launch/launch.h"
#include "cuda/sm80/backward.h"

namespace attnx::cuda {

using LaunchArguments = BackwardArguments;  // of this unit

template <Score kScore, DType kDType, int kHeadDim>
void launch_backward(const BackwardArguments& args, Variant variant, std::int64_t blocks, cudaStream_t stream) {
  using Input = typename Element<kDType>::Type;
  using Tiles = BackwardTiles<kHeadDim>;
  const auto launch = [&]<bool kListed, bool kAligned, class Tile>(std::bool_constant<kListed>,
                                                                   std::bool_constant<kAligned>, Tile) {
    launch_kernel("attnx_backward_sm80",
                  reinterpret_cast<const void*>(attnx_backward_sm80<kScore, Input, kListed, kAligned, Tile>), blocks,
                  Tile::kThreads, Tile::kSharedBytes, stream, args);
    launch_kernel("attnx_grad_query_sm80", reinterpret_cast<const void*>(attnx_grad_query_sm80<Input, kAligned, Tile>),
                  args.call.batch * args.heads.divisor() * args.query_blocks.divisor(), Tile::kThreads,
                  SharedTile<Tile::kM, Tile::kHeadDim>::kBytes, stream, args);
  };
  using Yes = std::true_type;
  using No = std::false_type;
  if (variant.listed) {
    variant.aligned ? launch(Yes(), Yes(), typename Tiles::Narrow()) : launch(Yes(), No(), typename Tiles::Narrow());
  } else if (!variant.aligned) {
    launch(No(), No(), typename Tiles::Narrow());
  } else if (variant.wide) {
    launch(No(), Yes(), typename Tiles::Wide());
  } else if constexpr (Tiles::Wide::kSharedBytes > kLeastSharedBytes) {
    launch(No(), Yes(), typename Tiles::Narrow());
  }
}

}  // namespace attnx::cuda
