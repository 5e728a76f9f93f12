// One kernel decodes over a staircase cache: the last block of those that share rows merges what they found.
#pragma once

#include "cuda/common/device.h"
#include "cuda/staircase/decode/merge.h"
#include "cuda/staircase/decode/warp.h"

namespace attnx::cuda {

template <int kBits, int kHeadDim>
__global__ void __launch_bounds__(kDecodeWarps * 32)
    attnx_staircase_decode(const __grid_constant__ DecodeArguments args) {
  extern __shared__ __align__(128) char memory[];
  const DecodePlace place(args);
  if (place.rows <= 0 || place.split >= place.blocks) return;
  const DecodeMerge merge(args, place, reinterpret_cast<float*>(memory));
  DecodeWarp<kBits, kHeadDim> warp(args, place,
                                   shared_address(memory) + threadIdx.x / 32 * DecodeMemory<kBits, kHeadDim>::kWarp);
  warp.run();
  __syncthreads();  // sums go where stages of other warps were
  merge.template leave<kHeadDim>(warp.sums, warp.rows.max, warp.rows.sum);
  __syncthreads();
  if (place.blocks == 1) return merge.finish(merge.of_warps());
  if (merge.share()) merge.finish(merge.of_blocks());
}

}  // namespace attnx::cuda
