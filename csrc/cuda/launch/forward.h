// Launches the forward kernel of one score, dtype and padded head dimension; each unit of these instantiates one.
#pragma once

#include "cuda/launch/element.h"
#include "cuda/launch/launch.h"
#include "cuda/sm80/forward.h"

namespace attnx::cuda {

using LaunchArguments = ForwardArguments;  // of this unit

template <Score kScore, DType kDType, int kHeadDim>
void launch_forward(const ForwardArguments& args, Variant variant, std::int64_t blocks, cudaStream_t stream) {
  using Tiles = ForwardTiles<kHeadDim>;
  const auto launch = [&]<bool kListed, bool kAligned, class Tile>(std::bool_constant<kListed>,
                                                                   std::bool_constant<kAligned>, Tile) {
    launch_kernel("attnx_forward_sm80",
                  reinterpret_cast<const void*>(
                      attnx_forward_sm80<kScore, typename Element<kDType>::Type, kListed, kAligned, Tile>),
                  blocks, Tile::kThreads, Tile::kSharedBytes, stream, args);
  };
  using Yes = std::true_type;
  using No = std::false_type;
  if (variant.listed) {
    variant.aligned ? launch(Yes(), Yes(), typename Tiles::Narrow()) : launch(Yes(), No(), typename Tiles::Narrow());
  } else if (!variant.aligned) {
    launch(No(), No(), typename Tiles::Narrow());
  } else {
    variant.wide ? launch(No(), Yes(), typename Tiles::Wide()) : launch(No(), Yes(), typename Tiles::Narrow());
  }
}

}  // namespace attnx::cuda
