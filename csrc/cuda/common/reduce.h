// These reduce over the lanes of a warp that share a row or a column of accumulators (tile.h), and over a block.
#pragma once

#include <cuda_runtime.h>

namespace attnx::cuda {

// Four lanes share a row.
__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Eight lanes share a column.
__device__ __forceinline__ float sum_of_column(float x) {
#pragma unroll
  for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// All threads of the block get the sum, which is the same bits every time.
template <int kThreads>
__device__ __forceinline__ double sum_of_block(double x) {
  __shared__ double of_warp[kThreads / 32];
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  __syncthreads();  // the readers of an earlier sum are done
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (const double part : of_warp) x += part;
  return x;
}

}  // namespace attnx::cuda
