#include "pooled_blocks.h"

#include <bit>

#include "cuda/common/device.h"
#include "cuda/common/element.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/routing/scores.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kVector = 8;  // elements of a lane

struct PoolArguments {
  PooledBlocks pooled[2];           // queries, keys
  std::int64_t of_queries, blocks;  // the means of queries, and all of them
  int head_dim, features;
  int lanes;  // that share a row: a power of 2
};

template <bool kAligned, class Input>
__device__ __forceinline__ void add_row(float (&sum)[kVector], const Input* row, int features) {
  if constexpr (kAligned) {
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(row));
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += float(reinterpret_cast<const Input*>(&x)[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < features) sum[i] += float(row[i]);
  }
}

// A warp has a block: it reads several rows at a time, and each lane a vector of one.
template <class Input, bool kAligned>
__global__ void __launch_bounds__(kThreads) attnx_pool_blocks(const __grid_constant__ PoolArguments args) {
  const std::int64_t at = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= args.blocks) return;
  const bool is_key = at >= args.of_queries;
  const PooledBlocks& x = args.pooled[is_key];
  const std::int64_t n = is_key ? at - args.of_queries : at;
  const std::int64_t block = n % x.blocks, head = n / x.blocks % x.heads, batch = n / x.blocks / x.heads;
  const std::int64_t before = x.starts ? x.starts[batch] : 0;
  const std::int64_t length = x.ends ? x.ends[batch] - before : x.length;
  const int rows = int(min(length - block * x.block, x.block));  // 0 or less beyond the sequence

  const int lane = threadIdx.x % 32, column = lane % args.lanes * kVector, rows_at_once = 32 / args.lanes;
  const Input* const from = static_cast<const Input*>(x.rows.data) + batch * x.rows.batch_stride +
                            head * x.rows.head_stride + (before + block * x.block) * x.rows.row_stride + column;
  float sum[kVector] = {};
  if (column < args.head_dim) {
#pragma unroll 8
    for (int r = lane / args.lanes; r < rows; r += rows_at_once)
      add_row<kAligned>(sum, from + r * x.rows.row_stride, args.head_dim - column);
  }
  for (int i = 16; i >= args.lanes; i /= 2)
#pragma unroll
    for (float& s : sum) s += __shfl_xor_sync(~0u, s, i);
  float* const to = x.means + n * args.features + column;
  const float count = x.sign * float(max(rows, 1));
#pragma unroll
  for (int i = 0; i < kVector; i += 4)
    if (lane < args.lanes && column + i < args.features)
      *reinterpret_cast<float4*>(to + i) =
          make_float4(sum[i] / count, sum[i + 1] / count, sum[i + 2] / count, sum[i + 3] / count);
}

}  // namespace

void pool_blocks(const BlockMapParams& p, const PooledBlocks& query, const PooledBlocks& key, const Launch& launch) {
  const std::int64_t of_queries = p.batch * query.heads * query.blocks;
  const auto vectors = unsigned(ceil_div(p.head_dim, kVector));
  const PoolArguments args{{query, key},
                           of_queries,
                           of_queries + p.batch * key.heads * key.blocks,
                           int(p.head_dim),
                           int(padded_to_vectors(p.head_dim)),
                           int(std::bit_ceil(vectors))};
  const bool aligned = are_aligned(p, {p.query}, {p.key}, {});
  with_dtype(p.dtype, [&]<DType kDType>() {
    using Input = typename Element<kDType>::Type;
    launch_kernel("attnx_pool_blocks", aligned ? attnx_pool_blocks<Input, true> : attnx_pool_blocks<Input, false>,
                  ceil_div(args.blocks, kWarps), kThreads, 0, static_cast<cudaStream_t>(launch.stream), args);
  });
}

}  // namespace attnx::cuda
