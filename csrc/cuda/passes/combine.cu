#include "combine.h"

#include "cuda/common/device.h"
#include "cuda/common/element.h"
#include "cuda/common/ptx.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kRowsOfBlock = kThreads / 32;

__device__ __forceinline__ Sequence sequence_of(const StaircaseCombineArguments& args, int batch) {
  Sequence sequence = sequence_of(static_cast<const Geometry&>(args), batch);
  if (args.query_lengths) sequence.length_q = int(args.query_lengths[batch]);
  return sequence;
}

}  // namespace

// A warp makes a row.
template <class Input, bool kNormalised, class Args>
__global__ void __launch_bounds__(kThreads) attnx_combine(const __grid_constant__ Args args) {
  const int lane = threadIdx.x % 32;
  const std::int64_t warp = (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const std::int64_t rows = args.batch * args.heads.divisor() * args.padded_rows;
  if (warp >= rows) return;
  const int row = int(warp % args.padded_rows);
  const int head = int(warp / args.padded_rows % args.heads.divisor());
  const int batch = int(warp / args.padded_rows / args.heads.divisor());
  const Sequence sequence = sequence_of(args, batch);
  if (row >= sequence.length_q * args.group.divisor()) return;

  float highest = -INFINITY, total = 0;
  if constexpr (kNormalised) {
    for (int s = lane; s < args.splits.divisor(); s += 32)
      highest = fmaxf(highest, args.partial.logsumexp[warp * args.splits.divisor() + s]);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, i));
  }
  const auto weight = [&](int s) {
    if constexpr (kNormalised) {
      const float x = args.partial.logsumexp[warp * args.splits.divisor() + s];
      return x == -INFINITY ? 0.0f : exp2_approx((x - highest) * kLog2E);  // it lets NaN stay NaN
    } else {
      return 1.0f;
    }
  };

  constexpr int kPerLane = kMaxHeadDim / 32;
  float sum[kPerLane] = {};
  for (int s = 0; s < args.splits.divisor(); ++s) {
    const float w = weight(s);
    total += w;
    const float* from = args.partial.output + (s * rows + warp) * args.features;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (lane + i * 32 < args.features) sum[i] = fmaf(w, from[lane + i * 32], sum[i]);
  }
  const float factor = kNormalised && total != 0 ? 1 / total : 1;

  const auto rows_of_head = [&]<class Element>(const Tensor& x, Element*) {
    return GroupedRows<Element>{rows_of<Element>(x, batch, query_head_of(args, head), sequence.first_q), x.row_stride,
                                x.head_stride, args.group};
  };
  Input* const output = rows_of_head(args.output, static_cast<Input*>(nullptr)).at(row);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (lane + i * 32 < int(args.value_dim)) output[lane + i * 32] = Input(sum[i] * factor);
  if (kNormalised && lane == 0 && args.logsumexp.data)
    *rows_of_head(args.logsumexp, static_cast<float*>(nullptr)).at(row) =
        total == 0 ? -INFINITY : highest + logf(total);
}

namespace {

template <class Args>
void combine(const Args& args, bool normalised, DType dtype, cudaStream_t stream) {
  const std::int64_t rows = args.batch * args.heads.divisor() * args.padded_rows;
  const auto launch = [&](auto* kernel) {
    launch_kernel("attnx_combine", kernel, (rows + kRowsOfBlock - 1) / kRowsOfBlock, kThreads, 0, stream, args);
  };
  if (dtype == DType::kBFloat16) {
    launch(normalised ? attnx_combine<__nv_bfloat16, true, Args> : attnx_combine<__nv_bfloat16, false, Args>);
  } else {
    launch(normalised ? attnx_combine<__half, true, Args> : attnx_combine<__half, false, Args>);
  }
}

}  // namespace

void launch_combine(const CombineArguments& args, bool normalised, DType dtype, cudaStream_t stream) {
  combine(args, normalised, dtype, stream);
}
void launch_combine(const StaircaseCombineArguments& args, bool normalised, DType dtype, cudaStream_t stream) {
  combine(args, normalised, dtype, stream);
}

}  // namespace attnx::cuda
