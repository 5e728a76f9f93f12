// This file registers torch.ops.attnx.sparse_linear_attention and its packed and backward forms: softmax over the
// critical blocks of a map, and linear attention over others. The method is that of arXiv 2509.24006.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "results.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "sparse_linear_attention";

struct Map {
  StableTensor block_map;
  std::int64_t block_q, block_k;
  ATTNX_FIELDS(block_map, block_q, block_k)
};

struct LinearOptions {
  std::string feature_map, linear_scope;
  ATTNX_FIELDS(feature_map, linear_scope)
};

struct Parts {
  StableTensor sparse, linear, logsumexp;
  ATTNX_FIELDS(sparse, linear, logsumexp)
};
struct PartGradients {
  StableTensor grad_sparse, grad_linear, grad_logsumexp;
  ATTNX_FIELDS(grad_sparse, grad_linear, grad_logsumexp)
};

void check_map(const StableTensor& map, const AttentionParams& p) {
  check_dtype("block_map", map, ScalarType::Char, "");
  const std::int64_t rows = blocks_of(p.length_q, p.block_q), blocks = blocks_of(p.length_k, p.block_k);
  // A map of packed sequences may be as wide as the longest or as its promised maximum.
  const auto fits = [&](std::int64_t size, std::int64_t needed) {
    return p.cu_seqlens_q ? size >= needed : size == needed;
  };
  check(map.dim() == 4 && (map.size(0) == 1 || map.size(0) == p.batch) &&
            (map.size(1) == 1 || map.size(1) == p.heads_q) && fits(map.size(2), rows) && fits(map.size(3), blocks),
        "block_map: expected shape (", p.batch, " or 1, ", p.heads_q, " or 1, ", rows, ", ", blocks, "), got ",
        shape_of(map));
  check_contiguous("block_map", map);
}

// It returns a number of critical blocks that no row exceeds.
std::int64_t check_labels(const StableTensor& map) {
  const auto values = values_on_host(map);
  if (!values) return map.size(3);
  std::int8_t lowest = 0, highest = 0;
  std::int64_t width = 0;
  const auto* labels = data<const std::int8_t>(*values);
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

// These are the critical blocks of a map as lists, none of which is longer than width. AttentionParams points into
// them.
struct CriticalBlocks {
  StableTensor counts, indices;

  BlockList view() const { return view_lists(counts, indices); }
};
CriticalBlocks list_critical_blocks(const Target& target, const StableTensor& map, std::int64_t width,
                                    bool transposed) {
  std::vector shape{map.size(0), map.size(1), map.size(transposed ? 3 : 2)};
  const StableTensor counts = make_empty(map, shape, ScalarType::Int);
  shape.push_back(width);
  const StableTensor indices = make_empty(map, shape, ScalarType::Int);
  run(CriticalBlocksParams{.heads = map.size(0) * map.size(1),
                           .query_blocks = map.size(2),
                           .key_blocks = map.size(3),
                           .labels = data<std::int8_t>(map),
                           .transposed = transposed,
                           .width = width,
                           .counts = data<std::int32_t>(counts),
                           .indices = data<std::int32_t>(indices)},
      target);
  return {counts, indices};
}

void read_linear(const AttentionParams& sparse, const StableTensor& map, const LinearOptions& options,
                 LinearParams& p) {
  static_cast<AttentionParams&>(p) = sparse;
  const auto& [feature_map, scope] = options;
  check(feature_map == "softmax" || feature_map == "elu" || feature_map == "relu",
        "feature_map: expected softmax, elu or relu, got ", feature_map);
  p.feature_map = feature_map == "softmax" ? FeatureMap::kSoftmax
                  : feature_map == "elu"   ? FeatureMap::kElu
                                           : FeatureMap::kRelu;
  check(scope == "marginal" || scope == "noncritical" || scope == "all",
        "linear_scope: expected marginal, noncritical or all, got ", scope);
  p.scope_low = scope == "marginal" ? 0 : -1;
  p.scope_high = scope == "all" ? 1 : 0;
  p.labels = data<const std::int8_t>(map);
  p.labels_batch_stride = map.size(0) == 1 ? 0 : map.stride(0);
  p.labels_head_stride = map.size(1) == 1 ? 0 : map.stride(1);
  p.labels_row_stride = map.stride(2);
}

template <class Layout>
CriticalBlocks read(const Target& target, const Inputs& x, const Layout& layout, const Map& map,
                    const LinearOptions& options, const Causal& causal, AttentionParams& sparse, LinearParams& linear) {
  sparse.score = Score::kSoftmax;
  read_block_size({map.block_q, map.block_k}, sparse);
  read_inputs(target, x, layout, sparse);
  read_window(causal, sparse);
  check_map(map.block_map, sparse);
  const std::int64_t width = check_labels(map.block_map);
  read_linear(sparse, map.block_map, options, linear);
  // On CUDA a call is the same whether or not labels were read.
  const CriticalBlocks critical =
      list_critical_blocks(target, map.block_map, target.on_cuda() ? map.block_map.size(3) : width, false);
  sparse.key_blocks = critical.view();
  return critical;
}

template <class Layout>
Parts forward(const Inputs& x, const Layout& layout, const Map& map, const LinearOptions& options,
              const Causal& causal) {
  const Target target{kSystem, x.query};
  ForwardParams sparse;
  LinearForwardParams linear;
  const CriticalBlocks critical = read(target, x, layout, map, options, causal, sparse, linear);
  StableTensor linear_output = empty_rows(x.query, sparse.value_dim);
  linear.output = view_rows(linear_output);
  const Outputs y = empty_outputs(x, sparse);
  run(sparse, linear, target);
  return {y.output, linear_output, y.logsumexp};
}

template <class Layout>
InputGradients backward(const PartGradients& grads, const Inputs& x, const Parts& parts, const Layout& layout,
                        const Map& map, const LinearOptions& options, const Causal& causal,
                        const Deterministic& option) {
  const Target target{kSystem, x.query, option.deterministic};
  BackwardParams sparse;
  LinearBackwardParams linear;
  const CriticalBlocks critical = read(target, x, layout, map, options, causal, sparse, linear);
  std::optional<CriticalBlocks> transposed;  // the CPU sums the gradients of keys without it
  if (target.on_cuda()) {
    transposed = list_critical_blocks(target, map.block_map, map.block_map.size(2), true);
    sparse.query_blocks = transposed->view();
  }
  sparse.grad_output = read_output("grad_sparse", grads.grad_sparse, x);
  sparse.grad_logsumexp = read_logsumexp("grad_logsumexp", grads.grad_logsumexp, x);
  sparse.output = read_output("sparse", parts.sparse, x);
  sparse.logsumexp = read_logsumexp("logsumexp", parts.logsumexp, x);
  linear.grad_output = read_output("grad_linear", grads.grad_linear, x);
  linear.output = read_output("linear", parts.linear, x);
  // The gradients of both branches are added before they are rounded.
  const ScalarType sums = sum_type(x.query);
  const InputGradients of_linear{empty_rows(x.query, sparse.head_dim, sums), empty_rows(x.key, sparse.head_dim, sums),
                                 empty_rows(x.value, sparse.value_dim, sums)};
  linear.grad_query = sparse.grad_query_addend = view_rows(of_linear.grad_query);
  linear.grad_key = sparse.grad_key_addend = view_rows(of_linear.grad_key);
  linear.grad_value = sparse.grad_value_addend = view_rows(of_linear.grad_value);
  const InputGradients gradients = empty_gradients(x, sparse);
  run(linear, target);
  run(sparse, target);
  return gradients;
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<forward<DenseWithLengths>>("sparse_linear_attention"),
                                 define<forward<Packed>>("sparse_linear_attention_varlen"),
                                 define<backward<DenseWithLengths>>("sparse_linear_attention_backward"),
                                 define<backward<Packed>>("sparse_linear_attention_varlen_backward")});

}  // namespace

}  // namespace attnx::ops
