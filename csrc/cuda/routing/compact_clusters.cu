// This moves the lists of clusters together that selection left apart.
#include <cub/block/block_scan.cuh>

#include "cuda/common/device.h"
#include "cuda/routing/routing.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 512;

using Scan = cub::BlockScan<int, kThreads>;

}  // namespace

// A block has one head. Only rows with NaN make a cluster short, so that lists seldom move.
__global__ void __launch_bounds__(kThreads) attnx_compact_clusters(const __grid_constant__ CompactClustersParams args) {
  __shared__ Scan::TempStorage scan;
  const std::int64_t head = blockIdx.x, slots = args.clusters * args.cluster_size;
  const std::int32_t* counts = args.counts + head * args.clusters;
  std::int32_t* const indices = args.indices + head * slots;
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
  if (total == slots) return;
  __syncthreads();  // all see the offsets

  for (std::int64_t c = 0; c < args.clusters; ++c) {
    const std::int64_t from = c * args.cluster_size, to = offsets[c];
    const int count = counts[c];
    if (from == to) continue;
    for (int begin = 0; begin < count; begin += kThreads) {
      const int i = begin + threadIdx.x;
      const std::int32_t index = i < count ? indices[from + i] : 0;
      __syncthreads();  // what is overwritten has been read
      if (i < count) indices[to + i] = index;
      __syncthreads();
    }
  }
  for (std::int64_t i = total + threadIdx.x; i < slots; i += kThreads) indices[i] = 0;
}

std::size_t compact_clusters_workspace(const CompactClustersParams&, const Launch&) { return 0; }

void compact_clusters(const CompactClustersParams& p, const Launch& launch) {
  launch_kernel("attnx_compact_clusters", attnx_compact_clusters, p.heads, kThreads, 0,
                static_cast<cudaStream_t>(launch.stream), p);
}

}  // namespace attnx::cuda
