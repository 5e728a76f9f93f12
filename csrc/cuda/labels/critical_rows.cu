#include "critical_blocks.h"
#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// A block has 32 neighbouring blocks of keys, a lane each: their labels lie together in every row. A warp gathers 32
// rows into a word of each lane, and the counts of the warps before it say where its entries begin.
__global__ void __launch_bounds__(kThreads) attnx_critical_rows(const __grid_constant__ CriticalBlocksParams p) {
  __shared__ int counts[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t groups = (p.key_blocks + 31) / 32, head = blockIdx.x / groups;
  const std::int64_t key_block = blockIdx.x % groups * 32 + lane;
  const int rows = key_block < p.key_blocks ? int(p.query_blocks) : 0;
  const std::int8_t* const labels = p.labels + head * p.query_blocks * p.key_blocks + key_block;
  std::int32_t* const list = p.indices + (head * p.key_blocks + key_block) * p.width;
  int count = 0;
  for (int begin = 0; begin < p.query_blocks; begin += kWarps * 32) {
    const int first = begin + warp * 32;
    unsigned critical = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (first + i < rows) critical |= unsigned(__ldg(labels + (first + i) * p.key_blocks) == 1) << i;
    counts[warp][lane] = __popc(critical);
    __syncthreads();
    int next = count;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      next += i < warp ? counts[i][lane] : 0;
      count += counts[i][lane];
    }
    __syncthreads();  // before the counts of the next rows
    for (; critical; critical &= critical - 1) list[next++] = first + __ffs(critical) - 1;
  }
  if (warp == 0 && key_block < p.key_blocks) p.counts[head * p.key_blocks + key_block] = count;
}

}  // namespace

void launch_critical_rows(const CriticalBlocksParams& p, const Launch& launch) {
  launch_kernel("attnx_critical_rows", attnx_critical_rows, p.heads * ((p.key_blocks + 31) / 32), kThreads, 0,
                static_cast<cudaStream_t>(launch.stream), p);
}

}  // namespace attnx::cuda
