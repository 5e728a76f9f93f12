// This sums the normalised rows of each centroid, in double and in a fixed order: rows are sorted by centroid first.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "cuda/common/device.h"
#include "cuda/routing/normalised_row.h"
#include "cuda/routing/routing.h"
#include "cuda/routing/sorted_lists.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct SumArguments {
  CentroidSumsParams params;
  const std::int32_t *indices, *offsets;  // [batch, heads, length], [batch, heads, clusters + 1]
};

}  // namespace

// A block has one centroid. Its warps take the rows in turn, and a lane sums some features.
template <class Input>
__global__ void __launch_bounds__(kThreads) attnx_centroid_sums(const __grid_constant__ SumArguments args) {
  const CentroidSumsParams& p = args.params;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, features = int(p.head_dim);
  const std::int64_t head = blockIdx.x / p.clusters, cluster = blockIdx.x % p.clusters;
  __shared__ double sums[kWarps][kMaxHeadDim];
  double sum[kPerLane] = {};
  std::int64_t count = 0;
  for (std::int64_t batch = 0; batch < p.batch; ++batch) {
    const std::int64_t all = batch * p.heads + head;
    const std::int32_t* offset = args.offsets + all * (p.clusters + 1) + cluster;
    const std::int32_t* indices = args.indices + all * p.length;
    const Input* rows =
        static_cast<const Input*>(p.rows.data) + batch * p.rows.batch_stride + head / p.group * p.rows.head_stride;
    for (int i = offset[0] + warp; i < offset[1]; i += kWarps) {
      float x[kPerLane];
      load_row(x, rows + indices[i] * p.rows.row_stride, features, lane);
      normalise(x, features, lane);
#pragma unroll
      for (int d = 0; d < kPerLane; ++d) sum[d] += double(x[d]);
    }
    count += offset[1] - offset[0];
  }
#pragma unroll
  for (int d = 0; d < kPerLane; ++d) sums[warp][d * 32 + lane] = sum[d];
  __syncthreads();
  for (int d = threadIdx.x; d < features; d += kThreads) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w][d];
    p.sums[blockIdx.x * p.head_dim + d] += total;
  }
  if (threadIdx.x == 0) p.counts[blockIdx.x] += double(count);
}

namespace {

struct SumMemory {
  SortedLists lists;
  char* sort;
  std::size_t bytes;

  SumMemory(const CentroidSumsParams& p, void* workspace) {
    const std::int64_t heads = p.batch * p.heads;
    WorkspaceLayout layout;
    auto* indices = layout.place<std::int32_t>(workspace, heads * p.length);
    auto* offsets = layout.place<std::int32_t>(workspace, heads * (p.clusters + 1));
    lists = {heads, p.length, p.clusters, p.nearest, nullptr, 0, indices, offsets};
    sort = layout.place<char>(workspace, std::int64_t(sort_into_lists_workspace(lists)));
    bytes = layout.bytes();
  }
};

using SumKernel = void (*)(SumArguments);

SumKernel kernel_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return attnx_centroid_sums<float>;
    case DType::kBFloat16: return attnx_centroid_sums<__nv_bfloat16>;
    case DType::kFloat16: return attnx_centroid_sums<__half>;
    default: throw std::runtime_error("centroid_sums: dtype: expected float32, bfloat16 or float16, got float64");
  }
}

}  // namespace

std::size_t centroid_sums_workspace(const CentroidSumsParams& p, const Launch&) { return SumMemory(p, nullptr).bytes; }

void centroid_sums(const CentroidSumsParams& p, const Launch& launch) {
  const SumMemory memory(p, launch.workspace);
  sort_into_lists(memory.lists, memory.sort, launch.stream);
  launch_kernel("attnx_centroid_sums", kernel_of(p.dtype), p.heads * p.clusters, kThreads, 0,
                static_cast<cudaStream_t>(launch.stream), SumArguments{p, memory.lists.items, memory.lists.offsets});
}

}  // namespace attnx::cuda
