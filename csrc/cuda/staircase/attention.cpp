#include "cuda/staircase/attention.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/common/device.h"
#include "cuda/dispatch/range.h"
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

struct DecodePlan {
  int rows = 0;  // of a block
  std::int64_t row_blocks = 0, tiles = 0, splits = 1;
  DecodeParts parts;
  std::size_t workspace = 0;
};

// The grid depends on what the cache can hold and not on what it holds, so that a captured graph replays it.
DecodePlan make_plan(const ForwardParams& p, void* workspace) {
  const StaircaseLayout& layout = p.cache->layout;
  DecodePlan plan;
  const std::int64_t all_rows = p.heads_q / p.heads_k * p.length_q;
  int row_tiles = 1;
  while (row_tiles < most_decode_tiles(layout.head_dim) && row_tiles * kDecodeRows < all_rows) row_tiles *= 2;
  plan.rows = row_tiles * kDecodeRows;
  plan.row_blocks = ceil_div(all_rows, plan.rows);
  plan.tiles = p.batch * p.heads_k * plan.row_blocks;
  if (plan.tiles == 0) return plan;
  plan.splits = splits_of(plan.tiles, most_turns(layout), decode_blocks_per_sm(layout.head_dim, row_tiles));
  if (plan.splits == 1) return plan;
  WorkspaceLayout memory;
  const std::int64_t rows = plan.tiles * plan.splits * plan.rows;
  plan.parts.output = memory.place<float>(workspace, rows * layout.head_dim);
  plan.parts.sums = memory.place<float2>(workspace, rows);
  plan.parts.finished = memory.place<int>(workspace, plan.tiles);
  plan.workspace = memory.bytes();
  return plan;
}

void check_alignment(const Staircase& cache) {
  for (const void* x : {static_cast<const void*>(cache.codes), static_cast<const void*>(cache.ranges),
                        static_cast<const void*>(cache.tail)})
    if (reinterpret_cast<std::uintptr_t>(x) % 16 != 0)
      throw std::runtime_error("cache: expected codes, ranges and tail to lie on 16 bytes");
}

}  // namespace

std::size_t staircase_attention_workspace(const ForwardParams& p) { return make_plan(p, nullptr).workspace; }

void staircase_attention(const ForwardParams& p, const Launch& where) {
  const Range range("attnx::staircase_attention");
  const DecodePlan plan = make_plan(p, where.workspace);
  if (plan.tiles == 0) return;
  check_alignment(*p.cache);
  const auto stream = static_cast<cudaStream_t>(where.stream);
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

KernelDescription describe_staircase(const ForwardParams& p) {
  const std::int64_t dim = p.cache->layout.head_dim;
  const int* const padded =
      std::find_if(std::begin(kDecodeHeadDims), std::end(kDecodeHeadDims), [&](int most) { return dim <= most; });
  KernelDescription x;
  x.kernel = "attnx_staircase_decode";
  x.mainloop = "decode";
  const DecodePlan plan = make_plan(p, nullptr);
  x.rows = plan.rows;
  x.keys = kDecodeTokens;
  x.head_dim = *padded;
  x.splits = int(plan.splits);
  return x;
}

}  // namespace attnx::cuda
