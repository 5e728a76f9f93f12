#include "place_sums.h"

#include <bit>

#include "cuda/common/device.h"
#include "cuda/common/divisor.h"
#include "cuda/common/element.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kChunk = 8;

template <class Input>
struct alignas(16) Chunk {
  Input elements[kChunk];
};

struct Arguments : PlaceSumsArguments {
  Divisor rows_of_head, heads_of_batch;
  int lanes;           // of a row, one for each chunk of 16 bytes: a power of two
  bool is_to_aligned;  // rows to write lie on 16 bytes and are multiples of them
};

bool are_rows_aligned(const Tensor& x, int features) {
  const auto together = reinterpret_cast<std::uintptr_t>(x.data) / 2 | std::uintptr_t(x.batch_stride | x.head_stride) |
                        std::uintptr_t(x.row_stride) | std::uintptr_t(features);
  return together % kChunk == 0;
}

}  // namespace

// A thread makes a chunk of a row; places are added up in their order.
template <class Input>
__global__ void __launch_bounds__(kThreads) attnx_place_sums(const __grid_constant__ Arguments args) {
  const int n = int(blockIdx.x) * (kThreads / args.lanes) + int(threadIdx.x) / args.lanes;  // the row, of all heads
  const int d = int(threadIdx.x) % args.lanes * kChunk;
  const int heads = args.heads_of_batch.divisor(), rows = args.rows_of_head.divisor();
  if (n >= args.batch * heads * rows || d >= args.features) return;
  const int all_heads = args.rows_of_head.divide(n), row = n - all_heads * rows;
  const int batch = args.heads_of_batch.divide(all_heads), head = all_heads - batch * heads;
  float sum[kChunk] = {};
  int count = 0;
  for (int g = 0; g < args.group; ++g) {
    const std::int64_t own = std::int64_t(head) * args.group + g, all = batch * args.heads + own;
    const std::int32_t* start = args.starts + all * (args.rows + 1) + row;
    const Input* from =
        static_cast<const Input*>(args.from.data) + batch * args.from.batch_stride + own * args.from.head_stride + d;
    const int begin = start[0], end = start[1];
    for (int i = begin; i < end; ++i) {
      const auto x =
          *reinterpret_cast<const Chunk<Input>*>(from + args.places[all * args.slots + i] * args.from.row_stride);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum[e] += float(x.elements[e]);
    }
    count += end - begin;
  }
  const float factor = args.is_mean && count > 1 ? 1 / float(count) : 1;
  Chunk<Input> result;
#pragma unroll
  for (int e = 0; e < kChunk; ++e) result.elements[e] = Input(sum[e] * factor);
  Input* const to = static_cast<Input*>(args.to.data) + batch * args.to.batch_stride + head * args.to.head_stride +
                    row * args.to.row_stride + d;
  if (args.is_to_aligned) {
    *reinterpret_cast<Chunk<Input>*>(to) = result;
  } else {
#pragma unroll
    for (int e = 0; e < kChunk; ++e)
      if (d + e < args.features) to[e] = result.elements[e];
  }
}

void launch_place_sums(const PlaceSumsArguments& args, DType dtype, cudaStream_t stream) {
  const int lanes = int(std::bit_ceil(unsigned(args.features + kChunk - 1) / kChunk)), rows_of_block = kThreads / lanes;
  const std::int64_t heads = args.heads / args.group, rows = args.batch * heads * args.rows;
  if (rows == 0) return;
  launch_kernel("attnx_place_sums",
                dtype == DType::kBFloat16 ? attnx_place_sums<__nv_bfloat16> : attnx_place_sums<__half>,
                (rows + rows_of_block - 1) / rows_of_block, kThreads, 0, stream,
                Arguments{args, Divisor(args.rows), Divisor(heads), lanes, are_rows_aligned(args.to, args.features)});
}

}  // namespace attnx::cuda
