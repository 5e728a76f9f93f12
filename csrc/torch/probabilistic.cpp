// This file registers torch.ops.attnx.probabilistic_attention and its packed and backward forms, and the operator that
// returns the lists of blocks that they sample.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "results.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "probabilistic_attention";

// A round is drawn from these.
struct Draw {
  StableTensor keep, seed, offset;
  ATTNX_FIELDS(keep, seed, offset)
};

struct Choice {
  SymInt blocks_per_row;  // 0: each block is kept or not on its own
  bool importance;
  ATTNX_FIELDS(blocks_per_row, importance)
};

struct Lengths {
  SymInt batch, heads, length_q, length_k;
  ATTNX_FIELDS(batch, heads, length_q, length_k)
};
struct ListOptions {
  SymInt blocks_per_row;
  bool is_causal;
  ATTNX_FIELDS(blocks_per_row, is_causal)
};

// Entries of a row of kv_indices that are not in use hold 0.
struct Lists {
  StableTensor kv_num_blocks, kv_indices;
  ATTNX_FIELDS(kv_num_blocks, kv_indices)
};

// AttentionParams points into these.
struct SampledBlocks {
  Lists lists;
  std::optional<StableTensor> corrections;
};

void check_keep(const StableTensor& keep, std::int64_t key_blocks) {
  check_dtype("keep", keep, ScalarType::Float, "");
  check(keep.dim() == 1 && keep.size(0) >= key_blocks, "keep: expected a probability for each distance, shape (",
        key_blocks, ",) or longer, got ", shape_of(keep));
  check_layout("keep", keep);
  const auto values = values_on_host(keep);
  if (!values) return;
  const auto* p = data<const float>(*values);
  for (std::int64_t d = 0; d < keep.size(0); ++d)
    check(p[d] >= 0 && p[d] <= 1, "keep: expected probabilities from 0 to 1, got ", p[d], " at distance ", d);
  check(keep.size(0) == 0 || p[0] == 1, "keep: expected 1 at distance 0, so that no row is empty, got ", p[0]);
}

void check_sizes(const Draw& draw, std::int64_t blocks_per_row, const BlockGrid& grid, std::int64_t batch,
                 std::int64_t heads) {
  const std::int64_t rows = grid.query_blocks(), width = grid.key_blocks();
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  check(std::max(rows, width) <= kMost, "length: expected at most ", kMost, " blocks, got ", rows, " of queries and ",
        width, " of keys");
  check_round(draw.seed, draw.offset);
  check_keep(draw.keep, width);
  check(blocks_per_row >= 0, "blocks_per_row: expected a number of blocks, or 0 for any, got ", blocks_per_row);
  constexpr std::int64_t kMostHeads = std::int64_t(1) << 32;  // the counter has 32 bits for them
  check(batch == 0 || heads <= kMostHeads / batch, "batch: expected at most ", kMostHeads, " heads in the batch, got ",
        batch, " times ", heads);
}

SampledBlocks empty_lists(const StableTensor& like, std::int64_t batch, std::int64_t heads, std::int64_t rows,
                          std::int64_t width, bool with_corrections) {
  const auto empty = [&](std::vector<std::int64_t> shape, ScalarType dtype) { return make_empty(like, shape, dtype); };
  SampledBlocks blocks{
      {empty({batch, heads, rows}, ScalarType::Int), empty({batch, heads, rows, width}, ScalarType::Int)}, {}};
  if (with_corrections) blocks.corrections = empty({batch, heads, rows, width}, ScalarType::Float);
  return blocks;
}

BlockList view(const SampledBlocks& blocks, Score score) {
  BlockList list = view_lists(blocks.lists.kv_num_blocks, blocks.lists.kv_indices);
  if (blocks.corrections) add_per_block(*blocks.corrections, is_normalised(score) ? list.bias : list.divisor, list);
  return list;
}

float* corrections_of(const SampledBlocks& blocks) {
  return blocks.corrections ? data<float>(*blocks.corrections) : nullptr;
}

// The blocks are drawn anew in the backward, so that nothing of them is kept in between. CUDA wants them transposed
// there as well; the second is empty elsewhere.
using Sampled = std::pair<SampledBlocks, std::optional<SampledBlocks>>;

Sampled sample(const Target& target, const Draw& draw, const Choice& choice, const BlockGrid& grid,
               const SequenceLengths& lengths, std::int64_t batch, std::int64_t heads, Score score, bool transposed) {
  check_sizes(draw, choice.blocks_per_row, grid, batch, heads);
  const std::int64_t rows = grid.query_blocks(), width = grid.key_blocks();
  Sampled sampled{empty_lists(draw.keep, batch, heads, rows, width, choice.importance), {}};
  const auto& [lists, corrections] = sampled.first;
  SampleBlocksParams params{.grid = grid,
                            .lengths = lengths,
                            .heads = batch * heads,
                            .sequence_heads = std::max<std::int64_t>(heads, 1),
                            .keep = data<float>(draw.keep),
                            .seed = data<std::int64_t>(draw.seed),
                            .offset = data<std::int64_t>(draw.offset),
                            .blocks_per_row = choice.blocks_per_row,
                            .counts = data<std::int32_t>(lists.kv_num_blocks),
                            .indices = data<std::int32_t>(lists.kv_indices),
                            .corrections = corrections_of(sampled.first),
                            .logarithm = is_normalised(score)};
  if (transposed) {
    sampled.second = empty_lists(draw.keep, batch, heads, width, rows, choice.importance);
    params.query_counts = data<std::int32_t>(sampled.second->lists.kv_num_blocks);
    params.query_indices = data<std::int32_t>(sampled.second->lists.kv_indices);
    params.query_corrections = corrections_of(*sampled.second);
  }
  run(params, target);
  return sampled;
}

template <class Layout>
Sampled read(const Target& target, const Inputs& x, const Layout& layout, const Draw& draw, const Choice& choice,
             const BlockSize& size, const ScoreOptions& options, const Causal& causal, AttentionParams& p,
             bool transposed = false) {
  read_score(options, p);
  read_inputs(target, x, layout, p);
  read_window(causal, p);
  check(!choice.importance || choice.blocks_per_row == 0,
        "importance: expected False where the number of blocks is fixed, as blocks are then not kept with keep's "
        "probabilities, got True");
  const BlockGrid grid{p.length_q, p.length_k, size.block_q, size.block_k, causal.is_causal};
  read_block_size(size, p);
  const SequenceLengths lengths{p.cu_seqlens_q, p.key_starts, p.key_ends};
  Sampled sampled = sample(target, draw, choice, grid, lengths, p.batch, p.heads_q, p.score, transposed);
  p.key_blocks = view(sampled.first, p.score);
  return sampled;
}

template <class Layout>
Outputs forward(const Inputs& x, const Layout& layout, const Draw& draw, const Choice& choice, const BlockSize& size,
                const ScoreOptions& options, const Causal& causal) {
  const Target target{kSystem, x.query};
  ForwardParams p;
  const Sampled sampled = read(target, x, layout, draw, choice, size, options, causal, p);
  return run_forward(target, x, p);
}

template <class Layout>
Gradients<Choice> backward(const OutputGradients& gradients, const Inputs& x, const Outputs& y, const Layout& layout,
                           const Draw& draw, const Choice& choice, const BlockSize& size, const ScoreOptions& options,
                           const Causal& causal, const Deterministic& option) {
  const Target target{kSystem, x.query, option.deterministic};
  BackwardParams p;
  const Sampled sampled = read(target, x, layout, draw, choice, size, options, causal, p, target.on_cuda());
  if (sampled.second) p.query_blocks = view(*sampled.second, p.score);
  read_outputs(gradients, y, x, p);
  return run_backward(target, x, choice, p);
}

Lists block_lists(const Draw& draw, const Lengths& lengths, const BlockSize& size, const ListOptions& options) {
  for_each_field(lengths, check_length);
  check_block_size(size);
  return sample({kSystem, draw.keep}, draw, {.blocks_per_row = options.blocks_per_row, .importance = false},
                {lengths.length_q, lengths.length_k, size.block_q, size.block_k, options.is_causal}, {}, lengths.batch,
                lengths.heads, Score::kSoftmax, false)
      .first.lists;
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<forward<DenseWithLengths>>("probabilistic_attention"),
                                 define<forward<PackedWithPadding>>("probabilistic_attention_varlen"),
                                 define<backward<DenseWithLengths>>("probabilistic_attention_backward"),
                                 define<backward<PackedWithPadding>>("probabilistic_attention_varlen_backward")});
const Registration lists_registration(kSystem, OnHost::kServed, {define<block_lists>("probabilistic_block_lists")});

}  // namespace

}  // namespace attnx::ops
