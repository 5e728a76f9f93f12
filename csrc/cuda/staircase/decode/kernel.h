// One kernel decodes over a staircase cache: the last block of those that share rows merges what they found.
#pragma once

#include "cuda/common/device.h"
#include "cuda/staircase/decode/block.h"
#include "cuda/staircase/decode/merge.h"

namespace attnx::cuda {

template <int kBits, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kDecodeWarps * 32, decode_blocks_per_sm(kHeadDim, kTiles))
    attnx_staircase_decode(const __grid_constant__ DecodeArguments args) {
  using Block = DecodeBlock<kBits, kHeadDim, kTiles>;
  using Memory = typename Block::Memory;
  extern __shared__ __align__(128) char memory[];
  float* const numbers = reinterpret_cast<float*>(memory);
  const DecodePlace place(args, Memory::kRows, Memory::kTurnTiles);
  if (place.rows <= 0 || place.split >= place.blocks) return;
  Block block(args, place, shared_address(memory));
  block.run();
  block.leave(numbers);
  DecodeMerge<Memory>(args, place, numbers).run();
}

}  // namespace attnx::cuda
