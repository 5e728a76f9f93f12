#include "cuda/common/device.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/routing/scores.h"
#include "pooled_blocks.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

struct SmoothArguments {
  PooledBlocks key;
  int features, groups;  // groups of 32 features
};

// A block has 32 features of a head, a lane each. Blocks of keys are summed in a fixed order, each with the weight of
// its keys.
__global__ void __launch_bounds__(kThreads) attnx_smooth_blocks(const __grid_constant__ SmoothArguments args) {
  __shared__ float sums[kWarps][32];
  const PooledBlocks& key = args.key;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, feature = blockIdx.x % args.groups * 32 + lane;
  const std::int64_t head = blockIdx.x / args.groups, batch = head / key.heads;
  const int length = key.ends ? key.ends[batch] - key.starts[batch] : int(key.length);
  const int block = int(key.block), blocks = feature < args.features ? (length + block - 1) / block : 0;
  float* const means = key.means + head * key.blocks * args.features + feature;
  float sum = 0;
#pragma unroll 4
  for (int j = warp; j < blocks; j += kWarps)
    sum = fmaf(means[std::int64_t(j) * args.features], float(min(length - j * block, block)), sum);
  sums[warp][lane] = sum;
  __syncthreads();
  float mean = 0;
#pragma unroll
  for (const auto& of_warp : sums) mean += of_warp[lane];
  mean /= float(max(length, 1));
#pragma unroll 4
  for (int j = warp; j < blocks; j += kWarps) means[std::int64_t(j) * args.features] -= mean;
}

}  // namespace

void smooth_blocks(const BlockMapParams& p, const PooledBlocks& key, const Launch& launch) {
  const SmoothArguments args{key, int(padded_to_vectors(p.head_dim)), int(ceil_div(p.head_dim, 32))};
  launch_kernel("attnx_smooth_blocks", attnx_smooth_blocks, p.batch * key.heads * args.groups, kThreads, 0,
                static_cast<cudaStream_t>(launch.stream), args);
}

}  // namespace attnx::cuda
