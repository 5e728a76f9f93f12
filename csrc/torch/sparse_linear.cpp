// torch.ops.attnx.sparse_linear_attention and its packed and backward forms: softmax over the critical blocks of a map,
// linear attention over others. arXiv 2509.24006.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "attnx/environment.h"
#include "backend.h"

namespace attnx::ops {

namespace {

constexpr const char* kOperator = "sparse_linear_attention";

struct Options {
  const StableTensor& block_map;
  std::int64_t block_q, block_k;
  const std::string &feature_map, &linear_scope;
};

// The critical blocks of a map as lists, none longer than width.
struct CriticalBlocks {
  StableTensor counts, indices;
  BlockList list;

  CriticalBlocks(const StableTensor& map, std::int64_t width)
      : counts(torch::stable::new_empty(map, std::vector{map.size(0), map.size(1), map.size(2)}, ScalarType::Int)),
        indices(
            torch::stable::new_empty(map, std::vector{map.size(0), map.size(1), map.size(2), width}, ScalarType::Int)) {
    CriticalBlocksParams p;
    p.rows = counts.numel();
    p.blocks = map.size(3);
    p.labels = static_cast<const std::int8_t*>(map.data_ptr());
    p.width = width;
    p.counts = static_cast<std::int32_t*>(counts.data_ptr());
    p.indices = static_cast<std::int32_t*>(indices.data_ptr());
    run(p);
    list.counts = p.counts;
    list.indices = p.indices;
    list.counts_head_stride = map.size(1) == 1 ? 0 : map.size(2);
    list.counts_batch_stride = map.size(0) == 1 ? 0 : map.size(1) * map.size(2);
    list.indices_row_stride = list.width = width;
    list.indices_head_stride = list.counts_head_stride * width;
    list.indices_batch_stride = list.counts_batch_stride * width;
  }
};

std::int64_t blocks_of(std::int64_t length, std::int64_t block) { return (length + block - 1) / block; }

// Returns what no row has more critical blocks than.
std::int64_t read_map(const StableTensor& map, const AttentionParams& p, const StableTensor& query) {
  check_dtype("block_map", map, ScalarType::Char, "");
  check_device("block_map", map, query);
  const std::int64_t rows = blocks_of(p.length_q, p.block_q), blocks = blocks_of(p.length_k, p.block_k);
  // Packed sequences: as wide as the longest or as its promised maximum.
  const auto fits = [&](std::int64_t size, std::int64_t needed) {
    return p.cu_seqlens_q ? size >= needed : size == needed;
  };
  check(map.dim() == 4 && (map.size(0) == 1 || map.size(0) == p.batch) &&
            (map.size(1) == 1 || map.size(1) == p.heads_q) && fits(map.size(2), rows) && fits(map.size(3), blocks),
        "block_map: expected shape (", p.batch, " or 1, ", p.heads_q, " or 1, ", rows, ", ", blocks, "), got ",
        shape_of(map));
  check_contiguous("block_map", map);
  const auto values = values_on_host(map);
  if (!values) return map.size(3);
  std::int8_t lowest = 0, highest = 0;
  std::int64_t width = 0;
  const auto* labels = static_cast<const std::int8_t*>(values->data_ptr());
  for (std::int64_t row = 0; row < map.size(0) * map.size(1) * map.size(2); ++row) {
    std::int64_t critical = 0;
    for (std::int64_t block = 0; block < map.size(3); ++block, ++labels) {
      lowest = std::min(lowest, *labels);
      highest = std::max(highest, *labels);
      critical += *labels == 1;
    }
    width = std::max(width, critical);
  }
  check(lowest >= -1 && highest <= 1, "block_map: expected 1 (critical), 0 (marginal) or -1 (negligible), got ",
        int(lowest < -1 ? lowest : highest));
  return width;
}

// What the sparse part is told. Returns what no row has more critical blocks than.
std::int64_t read_sparse(const Arguments& args, const Options& options, AttentionParams& p) {
  p.score = Score::kSoftmax;
  for (const std::int64_t block : {options.block_q, options.block_k})
    check(block == 64 || block == 128, "block_size: expected 64 or 128 on each side, got (", options.block_q, ", ",
          options.block_k, ")");
  read_arguments(args, p);
  p.block_q = options.block_q;
  p.block_k = options.block_k;
  return read_map(options.block_map, p, args.query);
}

void read_linear(const AttentionParams& sparse, const Options& options, LinearParams& p) {
  static_cast<AttentionParams&>(p) = sparse;
  p.key_blocks = {};
  if (options.feature_map == "softmax") {
    p.feature_map = FeatureMap::kSoftmax;
  } else if (options.feature_map == "elu") {
    p.feature_map = FeatureMap::kElu;
  } else {
    check(options.feature_map == "relu", "feature_map: expected softmax, elu or relu, got ", options.feature_map);
    p.feature_map = FeatureMap::kRelu;
  }
  const std::string& scope = options.linear_scope;
  check(scope == "marginal" || scope == "noncritical" || scope == "all",
        "linear_scope: expected marginal, noncritical or all, got ", scope);
  p.scope_low = scope == "marginal" ? 0 : -1;
  p.scope_high = scope == "all" ? 1 : 0;
  const StableTensor& map = options.block_map;
  p.labels = static_cast<const std::int8_t*>(map.data_ptr());
  p.labels_row_stride = map.size(3);
  p.labels_head_stride = map.size(1) == 1 ? 0 : map.size(2) * map.size(3);
  p.labels_batch_stride = map.size(0) == 1 ? 0 : map.size(1) * map.size(2) * map.size(3);
}

using Outputs = std::tuple<StableTensor, StableTensor, StableTensor>;

Outputs forward(const Arguments& args, const Options& options) {
  ForwardParams sparse;
  LinearForwardParams linear;
  const std::int64_t width = read_sparse(args, options, sparse);
  read_linear(sparse, options, linear);
  const CriticalBlocks critical(options.block_map, width);
  sparse.key_blocks = critical.list;
  StableTensor sparse_output = empty_rows(args.query, sparse.value_dim), logsumexp = empty_logsumexp(args.query);
  StableTensor linear_output = empty_rows(args.query, sparse.value_dim);
  sparse.output = view_rows(sparse_output);
  sparse.logsumexp = view_logsumexp(logsumexp);
  linear.output = view_rows(linear_output);
  run(sparse, args.query);
  run(linear);
  return {sparse_output, linear_output, logsumexp};
}

using Gradients = std::tuple<StableTensor, StableTensor, StableTensor>;

// What the backward has besides the forward's arguments.
struct Saved {
  const StableTensor &grad_sparse, &grad_linear, &grad_logsumexp, &sparse, &linear, &logsumexp;
};

Gradients backward(const Saved& saved, const Arguments& args, const Options& options, bool deterministic) {
  BackwardParams sparse;
  LinearBackwardParams linear;
  const std::int64_t width = read_sparse(args, options, sparse);
  read_linear(sparse, options, linear);
  const CriticalBlocks critical(options.block_map, width);
  sparse.key_blocks = critical.list;
  sparse.grad_output = read_output("grad_sparse", saved.grad_sparse, args);
  sparse.grad_logsumexp = read_logsumexp("grad_logsumexp", saved.grad_logsumexp, args);
  sparse.output = read_output("sparse", saved.sparse, args);
  sparse.logsumexp = read_logsumexp("logsumexp", saved.logsumexp, args);
  linear.grad_output = read_output("grad_linear", saved.grad_linear, args);
  linear.output = read_output("linear", saved.linear, args);
  StableTensor grad_query = empty_rows(args.query, sparse.head_dim), grad_key = empty_rows(args.key, sparse.head_dim);
  StableTensor grad_value = empty_rows(args.value, sparse.value_dim);
  sparse.grad_query = linear.grad_query = view_rows(grad_query);
  sparse.grad_key = linear.grad_key = view_rows(grad_key);
  sparse.grad_value = linear.grad_value = view_rows(grad_value);
  run(sparse, args.query, deterministic);
  run(linear);
  return {grad_query, grad_key, grad_value};
}

const std::optional<StableTensor> kNone;

Outputs sparse_linear_attention(const StableTensor& query, const StableTensor& key, const StableTensor& value,
                                const StableTensor& block_map, std::int64_t block_q, std::int64_t block_k,
                                const std::string& feature_map, const std::string& linear_scope,
                                std::optional<double> scale, bool is_causal) {
  return forward({query, key, value, nullptr, kNone, scale, is_causal, -1, -1, kOperator},
                 {block_map, block_q, block_k, feature_map, linear_scope});
}

Outputs sparse_linear_attention_varlen(const StableTensor& query, const StableTensor& key, const StableTensor& value,
                                       const StableTensor& cu_seqlens_q, const StableTensor& cu_seqlens_k,
                                       std::int64_t max_seqlen_q, std::int64_t max_seqlen_k,
                                       const StableTensor& block_map, std::int64_t block_q, std::int64_t block_k,
                                       const std::string& feature_map, const std::string& linear_scope,
                                       std::optional<double> scale, bool is_causal) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return forward({query, key, value, &packing, kNone, scale, is_causal, -1, -1, kOperator},
                 {block_map, block_q, block_k, feature_map, linear_scope});
}

Gradients sparse_linear_attention_backward(const StableTensor& grad_sparse, const StableTensor& grad_linear,
                                           const StableTensor& grad_logsumexp, const StableTensor& query,
                                           const StableTensor& key, const StableTensor& value,
                                           const StableTensor& sparse, const StableTensor& linear,
                                           const StableTensor& logsumexp, const StableTensor& block_map,
                                           std::int64_t block_q, std::int64_t block_k, const std::string& feature_map,
                                           const std::string& linear_scope, std::optional<double> scale, bool is_causal,
                                           bool deterministic) {
  return backward({grad_sparse, grad_linear, grad_logsumexp, sparse, linear, logsumexp},
                  {query, key, value, nullptr, kNone, scale, is_causal, -1, -1, kOperator},
                  {block_map, block_q, block_k, feature_map, linear_scope}, deterministic);
}

Gradients sparse_linear_attention_varlen_backward(
    const StableTensor& grad_sparse, const StableTensor& grad_linear, const StableTensor& grad_logsumexp,
    const StableTensor& query, const StableTensor& key, const StableTensor& value, const StableTensor& sparse,
    const StableTensor& linear, const StableTensor& logsumexp, const StableTensor& cu_seqlens_q,
    const StableTensor& cu_seqlens_k, std::int64_t max_seqlen_q, std::int64_t max_seqlen_k,
    const StableTensor& block_map, std::int64_t block_q, std::int64_t block_k, const std::string& feature_map,
    const std::string& linear_scope, std::optional<double> scale, bool is_causal, bool deterministic) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return backward({grad_sparse, grad_linear, grad_logsumexp, sparse, linear, logsumexp},
                  {query, key, value, &packing, kNone, scale, is_causal, -1, -1, kOperator},
                  {block_map, block_q, block_k, feature_map, linear_scope}, deterministic);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnx, m) {
  m.def(
      "sparse_linear_attention(Tensor query, Tensor key, Tensor value, Tensor block_map, int block_q, int block_k, "
      "str feature_map, str linear_scope, float? scale, bool is_causal) -> "
      "(Tensor sparse, Tensor linear, Tensor logsumexp)");
  m.def(
      "sparse_linear_attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor block_map, int block_q, int block_k, "
      "str feature_map, str linear_scope, float? scale, bool is_causal) -> "
      "(Tensor sparse, Tensor linear, Tensor logsumexp)");
  m.def(
      "sparse_linear_attention_backward(Tensor grad_sparse, Tensor grad_linear, Tensor grad_logsumexp, Tensor query, "
      "Tensor key, Tensor value, Tensor sparse, Tensor linear, Tensor logsumexp, Tensor block_map, int block_q, "
      "int block_k, str feature_map, str linear_scope, float? scale, bool is_causal, bool deterministic) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "sparse_linear_attention_varlen_backward(Tensor grad_sparse, Tensor grad_linear, Tensor grad_logsumexp, "
      "Tensor query, Tensor key, Tensor value, Tensor sparse, Tensor linear, Tensor logsumexp, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor block_map, int block_q, int block_k, "
      "str feature_map, str linear_scope, float? scale, bool is_causal, bool deterministic) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}

// CUDA has no kernel yet, nor has the emulator: there the table's refusal answers.
STABLE_TORCH_LIBRARY_IMPL(attnx, CPU, m) {
  if (kCudaOnHost) return;
  m.impl("sparse_linear_attention", TORCH_BOX(&sparse_linear_attention));
  m.impl("sparse_linear_attention_varlen", TORCH_BOX(&sparse_linear_attention_varlen));
  m.impl("sparse_linear_attention_backward", TORCH_BOX(&sparse_linear_attention_backward));
  m.impl("sparse_linear_attention_varlen_backward", TORCH_BOX(&sparse_linear_attention_varlen_backward));
}

}  // namespace attnx::ops
