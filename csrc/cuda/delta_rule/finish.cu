#include "cuda/common/device.h"
#include "cuda/delta_rule/chunk.h"
#include "cuda/delta_rule/gradients.h"

namespace attnx::cuda {

namespace {

// A warp sums up a row of dQ and of dK over the heads of values of a head of keys.
template <class Input>
__global__ void __launch_bounds__(kDeltaThreads)
    attnx_delta_rule_finish(const __grid_constant__ DeltaGradArguments args) {
  const DeltaRuleParams& p = args.p;
  const std::int64_t group = p.heads_v / p.heads_k;
  const std::int64_t row = std::int64_t(blockIdx.x) * kDeltaWarps + threadIdx.x / 32;
  if (row >= args.heads / group * p.length) return;
  const std::int64_t head = args.first_head / group + row / p.length, token = row % p.length;
  const auto sum_up = [&](const float* from, const Tensor& x) {
    Input* const to = row_of<Input>(x, int(head / p.heads_k), int(head % p.heads_k), token);
    from += (row / p.length * group * p.length + token) * p.key_dim;
    for (int k = threadIdx.x % 32; k < p.key_dim; k += 32) {
      float sum = 0;
      for (int g = 0; g < group; ++g) sum += from[g * p.length * p.key_dim + k];
      to[k] = Input(sum);
    }
  };
  sum_up(args.grad_queries, args.grad_query);
  sum_up(args.grad_keys, args.grad_key);
}

}  // namespace

void launch_delta_finish(const DeltaGradArguments& args, cudaStream_t stream) {
  const std::int64_t rows = args.heads / (args.p.heads_v / args.p.heads_k) * args.p.length;
  with_delta_dtype(args.p.dtype, [&]<class Input>() {
    launch_kernel("attnx_delta_rule_finish", attnx_delta_rule_finish<Input>, (rows + kDeltaWarps - 1) / kDeltaWarps,
                  kDeltaThreads, 0, stream, args);
  });
}

}  // namespace attnx::cuda
