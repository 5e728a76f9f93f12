#include "place_sums.h"

#include "cuda/common/device.h"
#include "cuda/common/element.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kPerLane = kMaxHeadDim / 32;

}  // namespace

// A warp makes a row; places are added up in their order.
template <class Input>
__global__ void __launch_bounds__(kThreads) attnx_place_sums(const __grid_constant__ PlaceSumsArguments args) {
  const int lane = threadIdx.x % 32;
  const std::int64_t warp = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const std::int64_t heads = args.heads / args.group;
  if (warp >= args.batch * heads * args.rows) return;
  const std::int64_t row = warp % args.rows, head = warp / args.rows % heads, batch = warp / args.rows / heads;
  float sum[kPerLane] = {};
  int count = 0;
  for (int g = 0; g < args.group; ++g) {
    const std::int64_t own = head * args.group + g, all = batch * args.heads + own;
    const std::int32_t* start = args.starts + all * (args.rows + 1) + row;
    const Input* from =
        static_cast<const Input*>(args.from.data) + batch * args.from.batch_stride + own * args.from.head_stride;
    for (int i = start[0]; i < start[1]; ++i) {
      const Input* x = from + args.places[all * args.slots + i] * args.from.row_stride;
#pragma unroll
      for (int d = 0; d < kPerLane; ++d)
        if (d * 32 + lane < args.features) sum[d] += float(x[d * 32 + lane]);
    }
    count += start[1] - start[0];
  }
  const float factor = args.is_mean && count > 1 ? 1 / float(count) : 1;
  Input* const to = static_cast<Input*>(args.to.data) + batch * args.to.batch_stride + head * args.to.head_stride +
                    row * args.to.row_stride;
#pragma unroll
  for (int d = 0; d < kPerLane; ++d)
    if (d * 32 + lane < args.features) to[d * 32 + lane] = Input(sum[d] * factor);
}

void launch_place_sums(const PlaceSumsArguments& args, DType dtype, cudaStream_t stream) {
  const std::int64_t rows = args.batch * (args.heads / args.group) * args.rows;
  launch_kernel("attnx_place_sums",
                dtype == DType::kBFloat16 ? attnx_place_sums<__nv_bfloat16> : attnx_place_sums<__half>,
                (rows * 32 + kThreads - 1) / kThreads, kThreads, 0, stream, args);
}

}  // namespace attnx::cuda
