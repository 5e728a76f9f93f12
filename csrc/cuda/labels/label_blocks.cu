#include "label_blocks.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/common/device.h"
#include "ranking.h"

namespace attnx::cuda {

namespace {

constexpr int kMaxWarps = 4;

// A sequence that a row of blocks lies beyond has no keys for it.
__device__ __forceinline__ BlockGrid grid_of(const LabelArguments& args, std::int64_t head, std::int64_t row) {
  if (!args.lengths.key_ends) return args.grid;
  BlockGrid grid = args.lengths.own(args.grid, (args.first_head + head) / args.heads_of_sequence);
  if (row >= grid.query_blocks()) grid.length_k = 0;
  return grid;
}

// A warp has a row.
template <bool kShared>
__global__ void __launch_bounds__(kMaxWarps * 32) attnx_label_blocks(const __grid_constant__ LabelArguments args) {
  extern __shared__ float4 copies[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t rows = args.grid.query_blocks(), blocks = args.grid.key_blocks();
  const std::int64_t at = std::int64_t(blockIdx.x) * (blockDim.x / 32) + warp;
  if (at >= args.heads * rows) return;
  const LabelRow row(grid_of(args, at / rows, at % rows), args.shares, at % rows);
  const int begin = int(row.begin), end = int(row.end), candidates = int(row.candidates);
  float* const copy = reinterpret_cast<float*>(copies) + warp * Ranking<true>::padded(blocks);
  const Ranking<kShared> ranking(args.products + at * args.row_stride + begin, end - begin, copy);
  const Cut critical = ranking.best(int(row.critical)), others = ranking.best(int(row.not_negligible));
  std::int8_t* const labels = args.labels + at * blocks;
#pragma unroll 4
  for (int block = lane; block < int(blocks); block += 32) {
    const int index = block - begin;
    const bool is_ranked = (index >= 0) & (block < end);
    const std::uint32_t key = is_ranked ? ranking.key(index) : 0;
    const int of_rank =
        int(critical.takes(key, index)) + int(others.takes(key, index)) - 1;  // the latter has the former
    labels[block] = std::int8_t(is_ranked ? of_rank : block < candidates ? 1 : -1);
  }
}

}  // namespace

void launch_label_blocks(const LabelArguments& args, const Launch& launch) {
  const std::int64_t row_bytes = Ranking<true>::padded(args.grid.key_blocks()) * std::int64_t(sizeof(float));
  const std::int64_t fit = row_bytes > 0 ? current_device().shared_bytes / row_bytes : 0;
  const int warps = fit > 0 ? int(std::min<std::int64_t>(fit, kMaxWarps)) : kMaxWarps;
  const std::int64_t rows = args.heads * args.grid.query_blocks();
  launch_kernel("attnx_label_blocks", fit > 0 ? attnx_label_blocks<true> : attnx_label_blocks<false>,
                (rows + warps - 1) / warps, warps * 32, fit > 0 ? int(warps * row_bytes) : 0,
                static_cast<cudaStream_t>(launch.stream), args);
}

void label_blocks(const LabelBlocksParams& p, const Launch& launch) {
  if (p.dtype != DType::kFloat32)
    throw std::runtime_error("label_blocks: products: expected float32, got another dtype");
  launch_label_blocks({.grid = p.grid,
                       .lengths = {},
                       .first_head = 0,
                       .heads = p.heads,
                       .heads_of_sequence = p.heads,
                       .products = static_cast<const float*>(p.products),
                       .row_stride = p.grid.key_blocks(),
                       .shares = p.shares,
                       .labels = p.labels},
                      launch);
}

}  // namespace attnx::cuda
