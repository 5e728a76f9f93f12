#include "cuda/linear/kernels.h"
#include "cuda/linear/operands.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// A warp makes a row of M from the labels.
template <class Input>
__global__ void __launch_bounds__(kThreads) attnx_linear_scope(const __grid_constant__ LinearArguments args) {
  const std::int64_t row = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, blocks = args.query_blocks_of_head;
  if (row >= args.batch * args.heads_q * blocks) return;
  const int query_block = int(row % blocks), head = int(row / blocks % args.heads_q),
            batch = int(row / blocks / args.heads_q);
  const std::int8_t* const labels = labels_of(args, batch, head, query_block);
  const int end = seen_blocks(args, sequence_of(args, batch), query_block).all;
  int count = 0;
  for (int key_block = lane; key_block < end; key_block += 32) count += in_scope(args, labels[key_block]);
#pragma unroll
  for (int i = 16; i > 0; i /= 2) count += __shfl_xor_sync(~0u, count, i);
  const float scale = count > 1 ? __int_as_float((127 - (32 - __clz(count - 1))) << 23) : 1.0f;
  if (lane == 0) args.scope_scales[row] = scale;
  Input* const to = static_cast<Input*>(args.scope) + row * args.scope_stride;
  for (int key_block = lane; key_block < args.scope_stride; key_block += 32)
    to[key_block] = Input(key_block < end && in_scope(args, labels[key_block]) ? scale : 0.0f);
}

}  // namespace

void launch_linear_scope(const LinearArguments& args, DType dtype, cudaStream_t stream) {
  const std::int64_t rows = args.batch * args.heads_q * args.query_blocks_of_head;
  void (*const kernel)(LinearArguments) =
      dtype == DType::kBFloat16 ? attnx_linear_scope<__nv_bfloat16> : attnx_linear_scope<__half>;
  launch_kernel("attnx_linear_scope", kernel, (rows + kWarps - 1) / kWarps, kThreads, 0, stream, args);
}

}  // namespace attnx::cuda
