#include "cuda/common/device.h"
#include "cuda/linear_state/kernels.h"
#include "cuda/linear_state/tokens.h"

namespace attnx::cuda {

namespace {

// A warp has a row.
template <class Input, bool kTaylor>
__global__ void __launch_bounds__(kStateThreads)
    attnx_linear_state_finish(const __grid_constant__ StateFinishArguments args, float factor) {
  const std::int64_t rows = args.p.batch * args.heads * args.length;
  const std::int64_t row = std::int64_t(blockIdx.x) * kStateWarps + threadIdx.x / 32;
  if (row >= rows) return;
  constexpr int kNumbers = kMaxHeadDim / 32;
  const int lane = threadIdx.x % 32, dim = int(args.p.head_dim);
  const int batch = int(row / args.length / args.heads), head = int(row / args.length % args.heads);
  const Input* const from = row_of<const Input>(args.from, batch, head, row % args.length);
  Input* const to = row_of<Input>(args.to, batch, head, row % args.length);
  float x[kNumbers], grad[kNumbers], highest = -INFINITY, sum = 0, dot = 0;
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
    const int d = n * 32 + lane;
    grad[n] = 0;
    for (int tile = 0; d < dim && tile < args.tiles; ++tile) grad[n] += args.parts[(tile * rows + row) * dim + d];
    x[n] = !kTaylor && d < dim ? float(from[d]) : -INFINITY;
    highest = fmaxf(highest, x[n]);
  }
  if (!kTaylor && args.p.feature_map == FeatureMap::kSoftmax) {
    highest = max_of_warp(highest);
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) {
      x[n] = expf(x[n] - highest);
      sum += x[n];
      dot = fmaf(x[n], grad[n], dot);
    }
    sum = 1 / sum_of_warp(sum);
    dot = sum_of_warp(dot) * sum;
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) grad[n] = x[n] * sum * (grad[n] - dot);
  } else if (!kTaylor) {
    const bool elu = args.p.feature_map == FeatureMap::kElu;
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) grad[n] *= x[n] > 0 ? 1 : elu ? expf(x[n]) : 0;
  }
#pragma unroll
  for (int n = 0; n < kNumbers; ++n)
    if (n * 32 + lane < dim) to[n * 32 + lane] = Input(grad[n] * factor);
}

}  // namespace

void launch_state_finish(const StateFinishArguments& args, float factor, cudaStream_t stream) {
  const std::int64_t rows = args.p.batch * args.heads * args.length;
  with_state_kernel(args.p, [&]<class Input, bool kTaylor>() {
    launch_kernel("attnx_linear_state_finish", attnx_linear_state_finish<Input, kTaylor>,
                  (rows + kStateWarps - 1) / kStateWarps, kStateThreads, 0, stream, args, factor);
  });
}

}  // namespace attnx::cuda
