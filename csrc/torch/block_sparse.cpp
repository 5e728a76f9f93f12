// torch.ops.attnx.block_sparse_attention and its backward: either score on the blocks that a list names.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "backend.h"

namespace attnx::ops {

namespace {

constexpr const char* kOperator = "block_sparse_attention";

struct Lists {
  const char *counts_name, *indices_name, *bias_name;
  const StableTensor &counts, &indices;
  const std::optional<StableTensor>& bias;
};

// Whether the first `count` of each row are blocks there are, on values in host memory.
void check_values(const Lists& lists, const StableTensor& counts, const StableTensor& indices, std::int64_t blocks) {
  const std::int64_t width = indices.size(3);
  for (std::int64_t b = 0; b < counts.size(0); ++b)
    for (std::int64_t h = 0; h < counts.size(1); ++h)
      for (std::int64_t i = 0; i < counts.size(2); ++i) {
        const auto* count =
            static_cast<const std::int32_t*>(counts.data_ptr()) + b * counts.stride(0) + h * counts.stride(1) + i;
        check(*count >= 0 && *count <= width, lists.counts_name, ": expected counts from 0 to the width of ",
              lists.indices_name, ", ", width, ", got ", *count, " at (", b, ", ", h, ", ", i, ")");
        const auto* row = static_cast<const std::int32_t*>(indices.data_ptr()) + b * indices.stride(0) +
                          h * indices.stride(1) + i * indices.stride(2);
        for (std::int64_t n = 0; n < *count; ++n)
          check(row[n] >= 0 && row[n] < blocks, lists.indices_name, ": expected blocks from 0 to ", blocks - 1,
                ", got ", row[n], " at (", b, ", ", h, ", ", i, ", ", n, ")");
      }
}

// Lists of some of `listed` blocks, for each of `rows` blocks.
BlockList read_lists(const Lists& lists, const AttentionParams& p, const StableTensor& query, std::int64_t rows,
                     std::int64_t listed) {
  const auto check_list = [&](const char* name, const StableTensor& x, ScalarType dtype, std::int64_t rank) {
    check_dtype(name, x, dtype, "");
    check_device(name, x, query);
    check(x.dim() == rank && (x.size(0) == 1 || x.size(0) == p.batch) && (x.size(1) == 1 || x.size(1) == p.heads_q) &&
              x.size(2) == rows,
          name, ": expected shape (", p.batch, " or 1, ", p.heads_q, " or 1, ", rows, rank == 4 ? ", width)" : ")",
          ", got ", shape_of(x));
    check_layout(name, x);
  };
  check_list(lists.counts_name, lists.counts, ScalarType::Int, 3);
  check_list(lists.indices_name, lists.indices, ScalarType::Int, 4);
  const auto stride = [](const StableTensor& x, int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); };
  BlockList list;
  list.counts = static_cast<const std::int32_t*>(lists.counts.data_ptr());
  list.counts_batch_stride = stride(lists.counts, 0);
  list.counts_head_stride = stride(lists.counts, 1);
  list.indices = static_cast<const std::int32_t*>(lists.indices.data_ptr());
  list.indices_batch_stride = stride(lists.indices, 0);
  list.indices_head_stride = stride(lists.indices, 1);
  list.indices_row_stride = lists.indices.stride(2);
  list.width = lists.indices.size(3);
  if (lists.bias) {
    check_list(lists.bias_name, *lists.bias, ScalarType::Float, 4);
    check(lists.bias->size(3) == lists.indices.size(3), lists.bias_name, ": expected the width of ", lists.indices_name,
          ", ", lists.indices.size(3), ", got ", lists.bias->size(3));
    list.bias = static_cast<const float*>(lists.bias->data_ptr());
    list.bias_batch_stride = stride(*lists.bias, 0);
    list.bias_head_stride = stride(*lists.bias, 1);
    list.bias_row_stride = lists.bias->stride(2);
  }
  const auto counts = values_on_host(lists.counts), indices = values_on_host(lists.indices);
  if (counts && indices) check_values(lists, *counts, *indices, listed);
  return list;
}

std::int64_t blocks_of(std::int64_t length, std::int64_t block) { return (length + block - 1) / block; }

struct Options {
  std::int64_t block_q, block_k;
  const std::string &score, &bias_rule;
  double bias_value;
};

// All that forward and backward share.
void read(const Arguments& args, const Lists& key_lists, const Options& options, AttentionParams& p) {
  check(options.score == "sigmoid" || options.score == "softmax", "score: expected sigmoid or softmax, got ",
        options.score);
  p.score = options.score == "sigmoid" ? Score::kSigmoid : Score::kSoftmax;
  read_arguments(args, p);
  read_bias({}, options.bias_rule, options.bias_value, args.query, p);
  for (const std::int64_t block : {options.block_q, options.block_k})
    check(block == 64 || block == 128, "block_size: expected 64 or 128 on each side, got (", options.block_q, ", ",
          options.block_k, ")");
  p.block_q = options.block_q;
  p.block_k = options.block_k;
  p.key_blocks =
      read_lists(key_lists, p, args.query, blocks_of(p.length_q, p.block_q), blocks_of(p.length_k, p.block_k));
}

using Outputs = std::tuple<StableTensor, StableTensor>;

Outputs block_sparse_attention(const StableTensor& query, const StableTensor& key, const StableTensor& value,
                               const StableTensor& kv_num_blocks, const StableTensor& kv_indices,
                               const std::optional<StableTensor>& block_bias, std::int64_t block_q,
                               std::int64_t block_k, const std::string& score, const std::string& bias_rule,
                               double bias_value, std::optional<double> scale, bool is_causal) {
  ForwardParams p;
  const std::optional<StableTensor> none;
  const Arguments args{query, key, value, nullptr, none, scale, is_causal, -1, -1, kOperator};
  read(args, {"kv_num_blocks", "kv_indices", "block_bias", kv_num_blocks, kv_indices, block_bias},
       {block_q, block_k, score, bias_rule, bias_value}, p);
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

Gradients block_sparse_attention_backward(
    const StableTensor& grad_output, const StableTensor& grad_logsumexp, const StableTensor& query,
    const StableTensor& key, const StableTensor& value, const StableTensor& output, const StableTensor& logsumexp,
    const StableTensor& kv_num_blocks, const StableTensor& kv_indices, const std::optional<StableTensor>& block_bias,
    const std::optional<StableTensor>& q_num_blocks, const std::optional<StableTensor>& q_indices,
    const std::optional<StableTensor>& q_block_bias, std::int64_t block_q, std::int64_t block_k,
    const std::string& score, const std::string& bias_rule, double bias_value, std::optional<double> scale,
    bool is_causal, bool deterministic) {
  BackwardParams p;
  const std::optional<StableTensor> none;
  const Arguments args{query, key, value, nullptr, none, scale, is_causal, -1, -1, kOperator};
  read(args, {"kv_num_blocks", "kv_indices", "block_bias", kv_num_blocks, kv_indices, block_bias},
       {block_q, block_k, score, bias_rule, bias_value}, p);
  // The CPU sums the gradients of keys over the blocks of queries as they come, and needs no transposed lists.
  if (uses_cuda(query)) {
    check(q_num_blocks && q_indices, "q_num_blocks, q_indices: expected the transposed lists on CUDA, got None");
    p.query_blocks = read_lists({"q_num_blocks", "q_indices", "q_block_bias", *q_num_blocks, *q_indices, q_block_bias},
                                p, query, blocks_of(p.length_k, block_k), blocks_of(p.length_q, block_q));
  }
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

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_attention_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnx, m) {
  m.def(
      "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor kv_num_blocks, Tensor kv_indices, "
      "Tensor? block_bias, int block_q, int block_k, str score, str bias_rule, float bias_value, float? scale, "
      "bool is_causal) -> (Tensor output, Tensor logsumexp)");
  m.def(
      "block_sparse_attention_backward(Tensor grad_output, Tensor grad_logsumexp, Tensor query, Tensor key, "
      "Tensor value, Tensor output, Tensor logsumexp, Tensor kv_num_blocks, Tensor kv_indices, Tensor? block_bias, "
      "Tensor? q_num_blocks, Tensor? q_indices, Tensor? q_block_bias, int block_q, int block_k, str score, "
      "str bias_rule, float bias_value, float? scale, bool is_causal, bool deterministic) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}

STABLE_TORCH_LIBRARY_IMPL(attnx, CPU, m) { implement(m); }
#if ATTNX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(attnx, CUDA, m) { implement(m); }
#endif

}  // namespace attnx::ops
