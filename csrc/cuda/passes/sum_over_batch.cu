#include "sum_over_batch.h"

#include "cuda/common/device.h"

namespace attnx::cuda {

__global__ void __launch_bounds__(256)
    attnx_sum_over_batch(const double* from, float* to, std::int64_t batch, std::int64_t heads) {
  const std::int64_t head = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (head >= heads) return;
  double sum = 0;
  for (std::int64_t b = 0; b < batch; ++b) sum += from[b * heads + head];
  to[head] = float(sum);
}

void sum_over_batch(const double* from, float* to, std::int64_t batch, std::int64_t heads, const Launch& launch) {
  launch_kernel("attnx_sum_over_batch", attnx_sum_over_batch, (heads + 255) / 256, 256, 0,
                static_cast<cudaStream_t>(launch.stream), from, to, batch, heads);
}

}  // namespace attnx::cuda
