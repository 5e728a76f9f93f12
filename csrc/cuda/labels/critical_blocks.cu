#include "critical_blocks.h"

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// A warp has a row of labels. What is critical finds its place by a ballot, so that the list comes ascending.
__global__ void __launch_bounds__(kThreads) attnx_critical_blocks(const __grid_constant__ CriticalBlocksParams p) {
  const std::int64_t row = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.heads * p.query_blocks) return;
  const int lane = threadIdx.x % 32, blocks = int(p.key_blocks);
  const std::int8_t* const labels = p.labels + row * p.key_blocks;
  std::int32_t* const list = p.indices + row * p.width;
  int count = 0;
#pragma unroll 4
  for (int first = 0; first < blocks; first += 32) {
    const int block = first + lane;
    const bool is_critical = block < blocks && __ldg(labels + block) == 1;
    const unsigned critical = __ballot_sync(~0u, is_critical);
    if (is_critical) list[count + __popc(critical & ((1u << lane) - 1))] = block;
    count += __popc(critical);
  }
  if (lane == 0) p.counts[row] = count;
}

}  // namespace

void critical_blocks(const CriticalBlocksParams& p, const Launch& launch) {
  if (p.transposed) return launch_critical_rows(p, launch);
  const std::int64_t rows = p.heads * p.query_blocks;
  launch_kernel("attnx_critical_blocks", attnx_critical_blocks, (rows + kWarps - 1) / kWarps, kThreads, 0,
                static_cast<cudaStream_t>(launch.stream), p);
}

}  // namespace attnx::cuda
