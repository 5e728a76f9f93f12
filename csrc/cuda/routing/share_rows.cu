#include "share_rows.h"

#include "cuda/common/device.h"
#include "cuda/common/element.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128;

}  // namespace

// A warp makes a row.
template <class Input>
__global__ void __launch_bounds__(kThreads) attnx_share_rows(const __grid_constant__ ShareRowsArguments args) {
  const std::int64_t warp = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (warp >= args.batch * args.heads * args.rows) return;
  const std::int64_t row = warp % args.rows, all = warp / args.rows, head = all % args.heads, batch = all / args.heads;
  const std::int32_t* start = args.starts + all * (args.rows + 1) + row;
  const float share = 1 / float(max(start[1] - start[0], 1));
  const Input* from = static_cast<const Input*>(args.from.data) + batch * args.from.batch_stride +
                      head * args.from.head_stride + row * args.from.row_stride;
  Input* const to = static_cast<Input*>(args.to) + warp * args.padded;
  for (int d = threadIdx.x % 32; d < args.padded; d += 32)
    to[d] = d < args.features ? Input(float(from[d]) * share) : Input(0.0f);
}

void launch_share_rows(const ShareRowsArguments& args, DType dtype, cudaStream_t stream) {
  const std::int64_t threads = args.batch * args.heads * args.rows * 32;
  launch_kernel("attnx_share_rows",
                dtype == DType::kBFloat16 ? attnx_share_rows<__nv_bfloat16> : attnx_share_rows<__half>,
                (threads + kThreads - 1) / kThreads, kThreads, 0, stream, args);
}

}  // namespace attnx::cuda
