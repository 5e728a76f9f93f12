// This puts the lists of clusters end to end that selection left apart.
#include <cub/block/block_scan.cuh>

#include "cuda/common/device.h"
#include "cuda/routing/routing.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 512;

using Scan = cub::BlockScan<int, kThreads>;

}  // namespace

// A block has one head. Its warps take the clusters in turn.
__global__ void __launch_bounds__(kThreads) attnx_compact_clusters(const __grid_constant__ CompactClustersParams args) {
  __shared__ Scan::TempStorage scan;
  const std::int64_t head = blockIdx.x;
  const std::int32_t* counts = args.counts + head * args.clusters;
  std::int32_t* const indices = args.indices + head * args.slots;
  std::int32_t* const offsets = args.offsets + head * (args.clusters + 1);
  int total = 0;
  for (std::int64_t begin = 0; begin < args.clusters; begin += kThreads) {
    const std::int64_t c = begin + threadIdx.x;
    int before, sum;
    Scan(scan).ExclusiveSum(c < args.clusters ? counts[c] : 0, before, sum);
    if (c < args.clusters) offsets[c] = total + before;
    total += sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) offsets[args.clusters] = total;
  __syncthreads();  // all see the offsets

  for (std::int64_t c = threadIdx.x / 32; c < args.clusters; c += kThreads / 32) {
    const std::int32_t* from = args.lists + (head * args.clusters + c) * args.cluster_size;
    for (int i = threadIdx.x % 32; i < counts[c]; i += 32) indices[offsets[c] + i] = from[i];
  }
  for (std::int64_t i = total + threadIdx.x; i < args.slots; i += kThreads) indices[i] = 0;
}

std::size_t compact_clusters_workspace(const CompactClustersParams&, const Launch&) { return 0; }

void compact_clusters(const CompactClustersParams& p, const Launch& launch) {
  launch_kernel("attnx_compact_clusters", attnx_compact_clusters, p.heads, kThreads, 0,
                static_cast<cudaStream_t>(launch.stream), p);
}

}  // namespace attnx::cuda
