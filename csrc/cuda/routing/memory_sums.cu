#include "memory_sums.h"

#include "cuda/common/device.h"
#include "cuda/common/element.h"

namespace attnx::cuda {

namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;

}  // namespace

// A block makes 32 features of a row. Its warps take the clusters in turn, and their sums are added in a fixed order.
template <class Input>
__global__ void __launch_bounds__(kThreads) attnx_memory_sums(const __grid_constant__ MemorySumsArguments args) {
  __shared__ float sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int parts = (args.features + 31) / 32, d = blockIdx.x % parts * 32 + lane;
  const int row = blockIdx.x / parts % args.memory, head = blockIdx.x / parts / args.memory;
  float sum = 0;
  for (std::int64_t batch = 0; batch < args.batch && d < args.features; ++batch)
    for (int g = 0; g < args.group; ++g) {
      const Input* from = static_cast<const Input*>(args.from.data) + batch * args.from.batch_stride +
                          (head * args.group + g) * args.from.head_stride + d;
      for (std::int64_t c = warp; c < args.clusters; c += kWarps)
        sum += float(from[(c * args.memory + row) * args.from.row_stride]);
    }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || d >= args.features) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  static_cast<Input*>(args.to.data)[head * args.to.head_stride + row * args.to.row_stride + d] = Input(sum);
}

void launch_memory_sums(const MemorySumsArguments& args, DType dtype, cudaStream_t stream) {
  const std::int64_t blocks = args.heads / args.group * args.memory * ((args.features + 31) / 32);
  launch_kernel("attnx_memory_sums",
                dtype == DType::kBFloat16 ? attnx_memory_sums<__nv_bfloat16> : attnx_memory_sums<__half>, blocks,
                kThreads, 0, stream, args);
}

}  // namespace attnx::cuda
