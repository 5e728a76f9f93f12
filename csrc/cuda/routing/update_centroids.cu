// These move centroids towards the sums of their members.
#include "cuda/common/device.h"
#include "cuda/common/reduce.h"
#include "cuda/routing/routing.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256;

}  // namespace

__global__ void __launch_bounds__(kThreads) attnx_halve_sums(const __grid_constant__ HalveSumsParams args) {
  const std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < args.count) args.halves[i] = float(0.5 * args.sums[i]);
}

// A block has one head.
__global__ void __launch_bounds__(kThreads) attnx_update_centroids(const __grid_constant__ UpdateCentroidsParams args) {
  constexpr double kSmoothing = 1e-5;
  const std::int64_t first = blockIdx.x * args.clusters;
  const double step = 1 - args.decay;
  double total = 0;
  for (std::int64_t c = threadIdx.x; c < args.clusters; c += kThreads) {
    float& count = args.counts[first + c];
    count = float(args.decay * count + step * args.members[first + c]);
    total += count;
  }
  total = sum_of_block<kThreads>(total);
  __syncthreads();  // all see the counts
  for (std::int64_t i = threadIdx.x; i < args.clusters * args.head_dim; i += kThreads) {
    const std::int64_t c = first + i / args.head_dim, d = first * args.head_dim + i;
    if (args.members[c] == 0) continue;
    const double smoothed = (args.counts[c] + kSmoothing) * total / (total + double(args.clusters) * kSmoothing);
    args.centroids[d] += float(step * (args.sums[d] - args.members[c] * args.centroids[d]) / smoothed);
  }
}

std::size_t halve_sums_workspace(const HalveSumsParams&, const Launch&) { return 0; }

void halve_sums(const HalveSumsParams& p, const Launch& launch) {
  launch_kernel("attnx_halve_sums", attnx_halve_sums, (p.count + kThreads - 1) / kThreads, kThreads, 0,
                static_cast<cudaStream_t>(launch.stream), p);
}

std::size_t update_centroids_workspace(const UpdateCentroidsParams&, const Launch&) { return 0; }

void update_centroids(const UpdateCentroidsParams& p, const Launch& launch) {
  if (p.decay == 1) return;  // nothing moves, and empty counts are not divided by
  launch_kernel("attnx_update_centroids", attnx_update_centroids, p.heads, kThreads, 0,
                static_cast<cudaStream_t>(launch.stream), p);
}

}  // namespace attnx::cuda
