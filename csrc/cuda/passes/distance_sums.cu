#include "cuda/passes/distance_sums.h"

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128;

}  // namespace

// A block has some of the distances of a sequence and head of the result.
__global__ void __launch_bounds__(kThreads) attnx_distance_sums(const __grid_constant__ DistanceSumsArguments args) {
  const DistanceBands& bands = args.bands;
  const int count = args.length_q + args.length_k - 1, parts = (count + kThreads - 1) / kThreads;
  const int place = int(blockIdx.x) % parts * kThreads + threadIdx.x;
  if (place >= count) return;
  const bool one_batch = args.to.batch_stride == 0, one_head = args.to.head_stride == 0;
  const int own_heads = one_head ? 1 : args.heads;
  const int head = int(blockIdx.x) / parts % own_heads, batch = int(blockIdx.x) / parts / own_heads;

  // The key less the row is this; the row's last tile starts at (row_tiles - 1) * rows.
  const int distance = place - (args.length_q - 1);
  const int shifted = distance + (bands.row_tiles - 1) * bands.rows;
  const int last = min((shifted + bands.rows - 1) / bands.rows, bands.count - 1);
  const int first = max((shifted - bands.keys) / bands.rows, 0);
  double sum = 0;
  for (int b = batch; b < (one_batch ? args.batch : batch + 1); ++b)
    for (int h = head; h < (one_head ? args.heads : head + 1); ++h)
      for (int band = first; band <= last; ++band) {
        const int own = distance - bands.offset(band) + bands.rows - 1;
        if (own < 0 || own >= bands.sums() - 1) continue;
        sum += __ldg(args.sums + ((std::int64_t(b) * args.heads + h) * bands.count + band) * bands.sums() + own);
      }
  float* const to =
      static_cast<float*>(const_cast<void*>(args.to.data)) + batch * args.to.batch_stride + head * args.to.head_stride;
  to[-distance] = float(sum);
}

void launch_distance_sums(const DistanceSumsArguments& args, cudaStream_t stream) {
  const std::int64_t parts = (args.length_q + args.length_k - 1 + kThreads - 1) / kThreads;
  const std::int64_t heads = args.to.head_stride == 0 ? 1 : args.heads,
                     batch = args.to.batch_stride == 0 ? 1 : args.batch;
  launch_kernel("attnx_distance_sums", attnx_distance_sums, batch * heads * parts, kThreads, 0, stream, args);
}

}  // namespace attnx::cuda
