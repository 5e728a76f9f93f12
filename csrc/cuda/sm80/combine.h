// The second pass of a split forward: one output from the partial ones, a warp a row.
#pragma once

#include "cuda/arguments.h"
#include "cuda/ptx.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

struct CombineArguments {
  ForwardArguments forward;
  int padded_rows;  // of a head: query_blocks * M
  int features;     // of a partial row
};

// Softmax partials are normalised and weighted by exp(logsumexp); sigmoid partials add up.
template <class Input, bool kSoftmax>
__global__ void __launch_bounds__(128) attnx_combine_sm80(const __grid_constant__ CombineArguments combine) {
  const auto& args = combine.forward;
  const auto& call = args.call;
  const int lane = threadIdx.x % 32;
  const std::int64_t warp = (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const std::int64_t rows = call.batch * args.heads.divisor() * combine.padded_rows;
  if (warp >= rows) return;
  const int row = int(warp % combine.padded_rows);
  const int head = int(warp / combine.padded_rows % args.heads.divisor());
  const int batch = int(warp / combine.padded_rows / args.heads.divisor());
  const Sequence sequence = args.sequence(batch);
  if (row >= sequence.length_q * args.group.divisor()) return;

  float highest = -INFINITY, total = 0;
  if constexpr (kSoftmax) {
    for (int s = lane; s < args.splits.divisor(); s += 32)
      highest = fmaxf(highest, args.partial_logsumexp[warp * args.splits.divisor() + s]);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, i));
  }
  const auto weight = [&](int s) {
    if constexpr (kSoftmax) {
      const float x = args.partial_logsumexp[warp * args.splits.divisor() + s];
      return x == -INFINITY ? 0.0f : exp2_approx((x - highest) * kLog2E);  // NaN stays NaN
    } else {
      return 1.0f;
    }
  };

  constexpr int kPerLane = kMaxHeadDim / 32;
  float sum[kPerLane] = {};
  for (int s = 0; s < args.splits.divisor(); ++s) {
    const float w = weight(s);
    total += w;
    const float* from = args.partial_output + (s * rows + warp) * combine.features;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (lane + i * 32 < combine.features) sum[i] = fmaf(w, from[lane + i * 32], sum[i]);
  }
  const float factor = kSoftmax && total != 0 ? 1 / total : 1;

  const GroupedRows<Input> output{rows_of<Input>(call.output, batch, args.query_head(head), sequence.first_q),
                                  call.output.row_stride, call.output.head_stride, args.group};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (lane + i * 32 < int(call.value_dim)) output.at(row)[lane + i * 32] = Input(sum[i] * factor);
  if (kSoftmax && lane == 0 && call.logsumexp.data) {
    const GroupedRows<float> logsumexp{rows_of<float>(call.logsumexp, batch, args.query_head(head), sequence.first_q),
                                       call.logsumexp.row_stride, call.logsumexp.head_stride, args.group};
    *logsumexp.at(row) = total == 0 ? -INFINITY : highest + logf(total);
  }
}

}  // namespace attnx::cuda
