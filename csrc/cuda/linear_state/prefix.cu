#include "cuda/common/device.h"
#include "cuda/linear_state/kernels.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256;

struct PrefixArguments {
  LinearStateArguments sums;
  Tensor before;
  float* last;
  std::int64_t blocks_of_head;
};

// A thread sums up one number of a head's states.
__global__ void __launch_bounds__(kThreads) attnx_linear_state_prefix(const __grid_constant__ PrefixArguments args) {
  const LinearStateArguments& a = args.sums;
  const std::int64_t head = blockIdx.x / args.blocks_of_head;
  const std::int64_t i = blockIdx.x % args.blocks_of_head * kThreads + threadIdx.x;
  if (i >= a.state_size) return;
  const int row_size = int(a.p.value_dim) + 1;
  const Tensor& before = args.before;
  float sum = 0;
  if (before.data)
    sum = static_cast<const float*>(
        before.data)[head / a.p.heads_k * before.batch_stride + head % a.p.heads_k * before.head_stride +
                     i / row_size * before.row_stride + i % row_size];
  for (int n = 0; n < a.segments; ++n) {
    const int segment = a.reversed ? a.segments - 1 - n : n;
    float& own = a.states[(head * a.segments + segment) * a.state_size + i];
    const float of_segment = own;
    own = sum;
    sum += of_segment;
  }
  if (args.last) args.last[head * a.state_size + i] = sum;
}

}  // namespace

void launch_state_prefix(const LinearStateArguments& args, const Tensor& before, void* last, cudaStream_t stream) {
  const std::int64_t blocks = (args.state_size + kThreads - 1) / kThreads;
  launch_kernel("attnx_linear_state_prefix", attnx_linear_state_prefix, args.p.batch * args.p.heads_k * blocks,
                kThreads, 0, stream, PrefixArguments{args, before, static_cast<float*>(last), blocks});
}

}  // namespace attnx::cuda
