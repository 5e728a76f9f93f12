// torch.ops.attnx.probabilistic_attention, its backward, and the lists of blocks that they sample.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "attnx/environment.h"
#include "backend.h"

namespace attnx::ops {

namespace {

constexpr const char* kOperator = "probabilistic_attention";

// What the lists are drawn from.
struct Sampling {
  const StableTensor &keep, &seed, &offset;
  std::int64_t blocks_per_row;  // 0: each block on its own
};

void check_number(const char* name, const StableTensor& x) {
  check_dtype(name, x, ScalarType::Long, "");
  check(x.dim() == 0, name, ": expected a tensor of shape (), got ", shape_of(x));
}

void check_round(const Sampling& sampling) {
  check_number("offset", sampling.offset);
  if (const auto values = values_on_host(sampling.offset)) {
    const std::int64_t offset = *static_cast<const std::int64_t*>(values->data_ptr());
    check(offset >= 0 && offset <= std::numeric_limits<std::uint32_t>::max(),
          "offset: expected a round from 0 to 4294967295, got ", offset);
  }
  check_number("seed", sampling.seed);
}

void check_keep(const StableTensor& keep, std::int64_t key_blocks) {
  check_dtype("keep", keep, ScalarType::Float, "");
  check(keep.dim() == 1 && keep.size(0) >= key_blocks, "keep: expected a probability for each distance, shape (",
        key_blocks, ",) or longer, got ", shape_of(keep));
  check_layout("keep", keep);
  const auto values = values_on_host(keep);
  if (!values) return;
  const auto* p = static_cast<const float*>(values->data_ptr());
  for (std::int64_t d = 0; d < keep.size(0); ++d)
    check(p[d] >= 0 && p[d] <= 1, "keep: expected probabilities from 0 to 1, got ", p[d], " at distance ", d);
  check(keep.size(0) == 0 || p[0] == 1, "keep: expected 1 at distance 0, so that no row is empty, got ", p[0]);
}

void check_blocks(const BlockGrid& grid) {
  for (const std::int64_t block : {grid.block_q, grid.block_k})
    check(block == 64 || block == 128, "block_size: expected 64 or 128 on each side, got (", grid.block_q, ", ",
          grid.block_k, ")");
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  check(std::max(grid.query_blocks(), grid.key_blocks()) <= kMost, "length: expected at most ", kMost, " blocks, got ",
        grid.query_blocks(), " of queries and ", grid.key_blocks(), " of keys");
}

// kv_num_blocks and kv_indices; what of a row is not in use holds 0.
using Lists = std::tuple<StableTensor, StableTensor>;

Lists sample(const Sampling& sampling, const BlockGrid& grid, std::int64_t batch, std::int64_t heads) {
  check_blocks(grid);
  const std::int64_t rows = grid.query_blocks(), width = grid.key_blocks();
  check_round(sampling);
  check_keep(sampling.keep, width);
  check(sampling.blocks_per_row >= 0, "blocks_per_row: expected a number of blocks, or 0 for any, got ",
        sampling.blocks_per_row);
  constexpr std::int64_t kMostHeads = std::int64_t(1) << 32;  // the counter has 32 bits for them
  check(batch == 0 || heads <= kMostHeads / batch, "batch: expected at most ", kMostHeads, " heads in the batch, got ",
        batch, " times ", heads);
  StableTensor counts = torch::stable::new_empty(sampling.keep, std::vector{batch, heads, rows}, ScalarType::Int);
  StableTensor indices =
      torch::stable::new_empty(sampling.keep, std::vector{batch, heads, rows, width}, ScalarType::Int);
  SampleBlocksParams p;
  p.grid = grid;
  p.heads = batch * heads;
  p.keep = static_cast<const float*>(sampling.keep.data_ptr());
  p.seed = static_cast<const std::int64_t*>(sampling.seed.data_ptr());
  p.offset = static_cast<const std::int64_t*>(sampling.offset.data_ptr());
  p.blocks_per_row = sampling.blocks_per_row;
  p.counts = static_cast<std::int32_t*>(counts.data_ptr());
  p.indices = static_cast<std::int32_t*>(indices.data_ptr());
  run(p);
  return {counts, indices};
}

StableTensor corrections(const Lists& lists, const BlockGrid& grid, const StableTensor& keep, Score score) {
  const auto& [counts, indices] = lists;
  StableTensor result = torch::stable::new_empty(indices, indices.sizes(), ScalarType::Float);
  CorrectionParams p;
  p.grid = grid;
  p.heads = counts.size(0) * counts.size(1);
  p.keep = static_cast<const float*>(keep.data_ptr());
  p.counts = static_cast<const std::int32_t*>(counts.data_ptr());
  p.indices = static_cast<const std::int32_t*>(indices.data_ptr());
  p.logarithm = score == Score::kSoftmax;
  p.corrections = static_cast<float*>(result.data_ptr());
  run(p);
  return result;
}

struct Options {
  bool importance;
  std::int64_t block_q, block_k;
  const std::string &score, &bias_rule;
  double bias_value;
};

// What AttentionParams points into.
struct SampledBlocks {
  Lists lists;
  std::optional<StableTensor> corrections;
};

// All that forward and backward share. The blocks are drawn anew in each, so that nothing of them is kept in between.
SampledBlocks read(const Arguments& args, const Sampling& sampling, const Options& options, AttentionParams& p) {
  check(options.score == "sigmoid" || options.score == "softmax", "score: expected sigmoid or softmax, got ",
        options.score);
  p.score = options.score == "sigmoid" ? Score::kSigmoid : Score::kSoftmax;
  read_arguments(args, p);
  read_bias({}, options.bias_rule, options.bias_value, args.query, p);
  check(!options.importance || sampling.blocks_per_row == 0,
        "importance: expected False where the number of blocks is fixed, as blocks are then not kept with keep's "
        "probabilities, got True");
  check_device("keep", sampling.keep, args.query);
  check_device("seed", sampling.seed, args.query);
  check_device("offset", sampling.offset, args.query);
  const BlockGrid grid{p.length_q, p.length_k, options.block_q, options.block_k, args.is_causal};
  SampledBlocks sampled{sample(sampling, grid, p.batch, p.heads_q), {}};
  p.block_q = grid.block_q;
  p.block_k = grid.block_k;
  const auto& [counts, indices] = sampled.lists;
  BlockList& list = p.key_blocks;
  list.counts = static_cast<const std::int32_t*>(counts.data_ptr());
  list.counts_batch_stride = counts.stride(0);
  list.counts_head_stride = counts.stride(1);
  list.indices = static_cast<const std::int32_t*>(indices.data_ptr());
  list.indices_batch_stride = list.bias_batch_stride = indices.stride(0);
  list.indices_head_stride = list.bias_head_stride = indices.stride(1);
  list.indices_row_stride = list.bias_row_stride = indices.stride(2);
  if (options.importance) {
    sampled.corrections = corrections(sampled.lists, grid, sampling.keep, p.score);
    (p.score == Score::kSoftmax ? list.bias : list.divisor) =
        static_cast<const float*>(sampled.corrections->data_ptr());
  }
  return sampled;
}

using Outputs = std::tuple<StableTensor, StableTensor>;

Outputs probabilistic_attention(const StableTensor& query, const StableTensor& key, const StableTensor& value,
                                const StableTensor& keep, const StableTensor& seed, const StableTensor& offset,
                                std::int64_t blocks_per_row, bool importance, std::int64_t block_q,
                                std::int64_t block_k, const std::string& score, const std::string& bias_rule,
                                double bias_value, std::optional<double> scale, bool is_causal) {
  ForwardParams p;
  const std::optional<StableTensor> none;
  const Arguments args{query, key, value, nullptr, none, scale, is_causal, -1, -1, kOperator};
  const SampledBlocks sampled =
      read(args, {keep, seed, offset, blocks_per_row}, {importance, block_q, block_k, score, bias_rule, bias_value}, p);
  StableTensor output = empty_rows(query, p.value_dim), logsumexp = empty_logsumexp(query);
  p.output = view_rows(output);
  if (p.score == Score::kSoftmax) {
    p.logsumexp = view_logsumexp(logsumexp);
  } else {
    torch::stable::zero_(logsumexp);
  }
  run(p, query);
  return {output, logsumexp};
}

using Gradients = std::tuple<StableTensor, StableTensor, StableTensor>;

Gradients probabilistic_attention_backward(
    const StableTensor& grad_output, const StableTensor& grad_logsumexp, const StableTensor& query,
    const StableTensor& key, const StableTensor& value, const StableTensor& output, const StableTensor& logsumexp,
    const StableTensor& keep, const StableTensor& seed, const StableTensor& offset, std::int64_t blocks_per_row,
    bool importance, std::int64_t block_q, std::int64_t block_k, const std::string& score, const std::string& bias_rule,
    double bias_value, std::optional<double> scale, bool is_causal, bool deterministic) {
  BackwardParams p;
  const std::optional<StableTensor> none;
  const Arguments args{query, key, value, nullptr, none, scale, is_causal, -1, -1, kOperator};
  const SampledBlocks sampled =
      read(args, {keep, seed, offset, blocks_per_row}, {importance, block_q, block_k, score, bias_rule, bias_value}, p);
  p.grad_output = read_output("grad_output", grad_output, args);
  p.grad_logsumexp = read_logsumexp("grad_logsumexp", grad_logsumexp, args);
  p.output = read_output("output", output, args);
  p.logsumexp = read_logsumexp("logsumexp", logsumexp, args);
  StableTensor grad_query = empty_rows(query, p.head_dim), grad_key = empty_rows(key, p.head_dim);
  StableTensor grad_value = empty_rows(value, p.value_dim);
  p.grad_query = view_rows(grad_query);
  p.grad_key = view_rows(grad_key);
  p.grad_value = view_rows(grad_value);
  run(p, query, deterministic);
  return {grad_query, grad_key, grad_value};
}

Lists probabilistic_block_lists(const StableTensor& keep, const StableTensor& seed, const StableTensor& offset,
                                std::int64_t batch, std::int64_t heads, std::int64_t length_q, std::int64_t length_k,
                                std::int64_t block_q, std::int64_t block_k, std::int64_t blocks_per_row,
                                bool is_causal) {
  for (const auto& [name, size] : {std::pair("batch", batch), std::pair("heads", heads),
                                   std::pair("length_q", length_q), std::pair("length_k", length_k)})
    check(size >= 0, name, ": expected 0 or more, got ", size);
  return sample({keep, seed, offset, blocks_per_row}, {length_q, length_k, block_q, block_k, is_causal}, batch, heads);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnx, m) {
  m.def(
      "probabilistic_attention(Tensor query, Tensor key, Tensor value, Tensor keep, Tensor seed, Tensor offset, "
      "int blocks_per_row, bool importance, int block_q, int block_k, str score, str bias_rule, float bias_value, "
      "float? scale, bool is_causal) -> (Tensor output, Tensor logsumexp)");
  m.def(
      "probabilistic_attention_backward(Tensor grad_output, Tensor grad_logsumexp, Tensor query, Tensor key, "
      "Tensor value, Tensor output, Tensor logsumexp, Tensor keep, Tensor seed, Tensor offset, int blocks_per_row, "
      "bool importance, int block_q, int block_k, str score, str bias_rule, float bias_value, float? scale, "
      "bool is_causal, bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "probabilistic_block_lists(Tensor keep, Tensor seed, Tensor offset, SymInt batch, SymInt heads, "
      "SymInt length_q, SymInt length_k, int block_q, int block_k, int blocks_per_row, bool is_causal) "
      "-> (Tensor kv_num_blocks, Tensor kv_indices)");
}

// CUDA has no kernel for them yet; there the table's refusal answers.
STABLE_TORCH_LIBRARY_IMPL(attnx, CPU, m) {
  m.impl("probabilistic_block_lists", TORCH_BOX(&probabilistic_block_lists));
  if (kCudaOnHost) return;
  m.impl("probabilistic_attention", TORCH_BOX(&probabilistic_attention));
  m.impl("probabilistic_attention_backward", TORCH_BOX(&probabilistic_attention_backward));
}

}  // namespace attnx::ops
