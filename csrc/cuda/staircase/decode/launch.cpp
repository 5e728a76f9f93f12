#include "cuda/staircase/decode/launch.h"

#include <algorithm>
#include <type_traits>

#include "cuda/common/device.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/dispatch/workspace.h"
#include "cuda/staircase/decode/unit.h"

namespace attnx::cuda {

namespace {

// A turn is up to 128 tokens of the first plane alone, 32 of a window that has more, or 16 of the tail.
std::int64_t most_turns(const StaircaseLayout& layout) {
  const std::int64_t refined = layout.planes > 1 ? layout.plane[1].windows * layout.window : 0;
  return ceil_div(layout.max_length, 4 * kDecodeTokens) + refined / kDecodeTokens +
         ceil_div(layout.tail_tokens(), kTailTokens);
}

// Blocks of all tiles are there at a time, if their shares still fill multiprocessors alike; else shares are smaller.
std::int64_t splits_of(std::int64_t tiles, std::int64_t most, int blocks_per_sm) {
  const std::int64_t multiprocessors = current_device().sm_count, slots = multiprocessors * blocks_per_sm;
  const auto uneven = [&](std::int64_t splits) {
    const std::int64_t blocks = tiles * splits;
    return blocks * 10 < ceil_div(blocks, multiprocessors) * multiprocessors * 9;
  };
  std::int64_t splits = std::max<std::int64_t>(slots / tiles, 1);
  while (uneven(splits) && (splits + 1) * tiles <= 4 * slots) ++splits;
  return std::min(splits, most);
}

}  // namespace

DecodePlan::DecodePlan(const ForwardParams& p, void* memory_of_call) {
  const StaircaseLayout& layout = p.cache->layout;
  const std::int64_t all_rows = p.heads_q / p.heads_k * p.length_q;
  int row_tiles = 1;
  while (row_tiles < most_decode_tiles(layout.head_dim) && row_tiles * kDecodeRows < all_rows) row_tiles *= 2;
  rows = row_tiles * kDecodeRows;
  head_dim = *std::find_if(std::begin(kDecodeHeadDims), std::end(kDecodeHeadDims),
                           [&](int x) { return layout.head_dim <= x; });
  row_blocks = ceil_div(all_rows, rows);
  tiles = p.batch * p.heads_k * row_blocks;
  if (tiles == 0) return;
  splits = splits_of(tiles, most_turns(layout), decode_blocks_per_sm(layout.head_dim, row_tiles));
  if (splits == 1) return;
  WorkspaceLayout memory;
  const std::int64_t rows_of_parts = tiles * splits * rows;
  parts.output = memory.place<float>(memory_of_call, rows_of_parts * layout.head_dim);
  parts.sums = memory.place<float2>(memory_of_call, rows_of_parts);
  parts.finished = memory.place<int>(memory_of_call, tiles);
  workspace = memory.bytes();
}

void run_decode(const ForwardParams& p, const DecodePlan& plan, cudaStream_t stream) {
  const StaircaseLayout& layout = p.cache->layout;
  DecodeArguments args;
  args.cache = *p.cache;
  args.query = p.query;
  args.output = p.output;
  args.logsumexp = p.logsumexp;
  args.query_lengths = p.query_lengths;
  args.bfloat16 = p.dtype == DType::kBFloat16;
  args.softmax = is_normalised(p.score);
  args.causal = p.window_right == 0;
  args.scale_log2 = float(p.scale * 1.4426950408889634);
  args.bias_rule = p.bias_rule;
  args.bias_value = float(p.bias_value);
  args.bias = p.bias;
  args.length_q = int(p.length_q);
  args.heads_q = int(p.heads_q);
  args.row_blocks = int(plan.row_blocks);
  args.splits = int(plan.splits);
  args.groups = int(layout.head_dim / layout.group);
  args.matrix_ranges = layout.matrix_ranges();
  args.window_ranges = layout.window_ranges();
  args.heads_on_key_head = Divisor(p.heads_q / p.heads_k);
  args.window_tiles = Divisor(layout.window / kDecodeTokens);
  args.group_tiles = Divisor(layout.group / kDecodeTokens);
  args.parts = plan.parts;
  if (plan.splits > 1)
    check(cudaMemsetAsync(plan.parts.finished, 0, std::size_t(plan.tiles) * sizeof(int), stream), "cudaMemsetAsync");
  const std::int64_t blocks = plan.tiles * plan.splits;
  const auto launch = [&]<int kBits>(std::integral_constant<int, kBits>) {
    switch (plan.rows / kDecodeRows) {
      case 1: return launch_decode<kBits, 1>(args, blocks, stream);
      case 2: return launch_decode<kBits, 2>(args, blocks, stream);
      case 4: return launch_decode<kBits, 4>(args, blocks, stream);
      default: return launch_decode<kBits, 8>(args, blocks, stream);
    }
  };
  switch (layout.plane[0].bits) {
    case 1: return launch(std::integral_constant<int, 1>());
    case 2: return launch(std::integral_constant<int, 2>());
    case 4: return launch(std::integral_constant<int, 4>());
    default: return launch(std::integral_constant<int, 8>());
  }
}

}  // namespace attnx::cuda
