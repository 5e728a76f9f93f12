// torch.ops.attnx.routing_attention and its backward: attention within clusters of rows. Roy et al., arXiv 2003.05997.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "arguments.h"
#include "attnx/environment.h"
#include "backend.h"

namespace attnx::ops {

namespace {

constexpr const char* kOperator = "routing_attention";

struct Lists {
  const char *indices_name, *offsets_name;
  const StableTensor &indices, &offsets;
};

// Bounds, where values are not read.
struct LongestAndCounts {
  std::int64_t longest;  // no cluster is longer
  bool once;             // no row is in two clusters
};

// Checks that clusters are lists of ascending rows.
LongestAndCounts read_clusters(const Lists& lists, const AttentionParams& p, std::int64_t rows, const char* rows_name,
                               const StableTensor& query, Clusters& clusters) {
  const std::int64_t heads = p.batch * p.heads_q;
  for (const auto& [name, x] :
       {std::pair(lists.indices_name, &lists.indices), std::pair(lists.offsets_name, &lists.offsets)}) {
    check_dtype(name, *x, ScalarType::Int, "");
    check_device(name, *x, query);
    check(x->is_contiguous(), name, ": expected a contiguous tensor, got one with other strides");
  }
  check(lists.offsets.dim() == 3 && lists.offsets.size(0) == p.batch && lists.offsets.size(1) == p.heads_q &&
            lists.offsets.size(2) >= 2,
        lists.offsets_name, ": expected shape (", p.batch, ", ", p.heads_q, ", clusters + 1), got ",
        shape_of(lists.offsets));
  check(lists.indices.dim() == 3 && lists.indices.size(0) == p.batch && lists.indices.size(1) == p.heads_q,
        lists.indices_name, ": expected shape (", p.batch, ", ", p.heads_q, ", slots), got ", shape_of(lists.indices));
  const std::int64_t count = lists.offsets.size(2) - 1, slots = lists.indices.size(2);
  clusters.indices = static_cast<const std::int32_t*>(lists.indices.data_ptr());
  clusters.offsets = static_cast<const std::int32_t*>(lists.offsets.data_ptr());
  clusters.slots = slots;
  clusters.rows = rows;
  const auto indices = values_on_host(lists.indices), offsets = values_on_host(lists.offsets);
  if (!indices || !offsets) return {std::min(slots, rows), false};
  LongestAndCounts result{0, true};
  std::vector<bool> seen;
  for (std::int64_t head = 0; head < heads; ++head) {
    const auto* offset = static_cast<const std::int32_t*>(offsets->data_ptr()) + head * (count + 1);
    const auto* index = static_cast<const std::int32_t*>(indices->data_ptr()) + head * slots;
    check(offset[0] == 0 && offset[count] <= slots, lists.offsets_name, ": expected offsets from 0 to at most the ",
          slots, " slots of ", lists.indices_name, ", got from ", offset[0], " to ", offset[count]);
    for (std::int64_t c = 0; c < count; ++c) {
      check(offset[c] <= offset[c + 1], lists.offsets_name, ": expected rising offsets, got ", offset[c + 1], " after ",
            offset[c]);
      result.longest = std::max<std::int64_t>(result.longest, offset[c + 1] - offset[c]);
    }
    seen.assign(std::size_t(result.once ? rows : 0), false);
    for (std::int64_t c = 0; c < count; ++c) {
      for (std::int64_t i = offset[c]; i < offset[c + 1]; ++i) {
        check(index[i] >= 0 && index[i] < rows, lists.indices_name, ": expected indices of ", rows_name, " from 0 to ",
              rows - 1, ", got ", index[i]);
        check(i == offset[c] || index[i] > index[i - 1], lists.indices_name,
              ": expected ascending indices in each cluster, got ", index[i], " after ", index[i - 1]);
        if (!result.once) continue;
        result.once = !seen[std::size_t(index[i])];
        seen[std::size_t(index[i])] = true;
      }
    }
  }
  return result;
}

struct Options {
  const Lists queries, keys;
  const std::optional<StableTensor>&memory_key, &memory_value;
  const std::string &score, &bias_rule;
  double bias_value;
};

Tensor view_memory(const StableTensor& x) { return {x.data_ptr(), 0, x.stride(0), x.stride(1)}; }

void read_memory(const char* name, const std::optional<StableTensor>& x, std::int64_t dim, const AttentionParams& p,
                 const StableTensor& query) {
  check_dtype(name, *x, query.scalar_type(), " like query");
  check_device(name, *x, query);
  check(x->dim() == 3, name, ": expected 3 dimensions, (kv_heads, memory, dim), got shape ", shape_of(*x));
  check_shape(name, *x, {p.heads_k, x->size(1), dim});
  check_layout(name, *x);
}

// All that forward and backward share. Returns whether no query is in two clusters.
bool read(const Arguments& args, const Options& options, AttentionParams& p, Gather& g) {
  check(options.score == "sigmoid" || options.score == "softmax", "score: expected sigmoid or softmax, got ",
        options.score);
  p.score = options.score == "sigmoid" ? Score::kSigmoid : Score::kSoftmax;
  read_arguments(args, p);
  read_bias({}, options.bias_rule, options.bias_value, args.query, p);
  p.gather = &g;
  const auto queries = read_clusters(options.queries, p, p.length_q, "query", args.query, g.queries);
  const auto keys = read_clusters(options.keys, p, p.length_k, "key", args.query, g.keys);
  g.clusters = options.queries.offsets.size(2) - 1;
  check_shape(options.keys.offsets_name, options.keys.offsets, {p.batch, p.heads_q, g.clusters + 1});
  check(options.memory_key.has_value() == options.memory_value.has_value(),
        "memory_key, memory_value: expected both or none, got one");
  if (options.memory_key) {
    read_memory("memory_key", options.memory_key, p.head_dim, p, args.query);
    read_memory("memory_value", options.memory_value, p.value_dim, p, args.query);
    g.memory = options.memory_key->size(1);
    check_shape("memory_value", *options.memory_value, {p.heads_k, g.memory, p.value_dim});
    g.memory_key = view_memory(*options.memory_key);
    g.memory_value = view_memory(*options.memory_value);
  }
  check(g.keys.slots + g.clusters * g.memory <= std::numeric_limits<std::int32_t>::max(),
        "memory_key: expected at most 2147483647 keys in all clusters, got ", g.keys.slots + g.clusters * g.memory);
  p.length_q = queries.longest;
  p.length_k = keys.longest + g.memory;
  return queries.once;
}

using Outputs = std::tuple<StableTensor, StableTensor>;

Outputs routing_attention(const StableTensor& query, const StableTensor& key, const StableTensor& value,
                          const StableTensor& query_indices, const StableTensor& query_offsets,
                          const StableTensor& key_indices, const StableTensor& key_offsets,
                          const std::optional<StableTensor>& memory_key,
                          const std::optional<StableTensor>& memory_value, const std::string& score,
                          const std::string& bias_rule, double bias_value, std::optional<double> scale,
                          bool is_causal) {
  ForwardParams p;
  Gather gather;
  const std::optional<StableTensor> none;
  const Arguments args{query, key, value, nullptr, none, scale, is_causal, -1, -1, kOperator};
  read(args,
       {{"query_indices", "query_offsets", query_indices, query_offsets},
        {"key_indices", "key_offsets", key_indices, key_offsets},
        memory_key,
        memory_value,
        score,
        bias_rule,
        bias_value},
       p, gather);
  StableTensor output = empty_rows(query, p.value_dim);
  // What of a head's slots is not in use holds 0.
  StableTensor logsumexp = torch::stable::new_zeros(query, query_indices.sizes(), sum_type(query));
  p.output = view_rows(output);
  if (p.score == Score::kSoftmax) p.logsumexp = {logsumexp.data_ptr(), 0, 0, 1};
  run(p, query);
  return {output, logsumexp};
}

using Gradients = std::tuple<StableTensor, StableTensor, StableTensor, StableTensor, StableTensor>;

Gradients routing_attention_backward(const StableTensor& grad_output, const StableTensor& grad_logsumexp,
                                     const StableTensor& query, const StableTensor& key, const StableTensor& value,
                                     const StableTensor& output, const StableTensor& logsumexp,
                                     const StableTensor& query_indices, const StableTensor& query_offsets,
                                     const StableTensor& key_indices, const StableTensor& key_offsets,
                                     const std::optional<StableTensor>& memory_key,
                                     const std::optional<StableTensor>& memory_value, const std::string& score,
                                     const std::string& bias_rule, double bias_value, std::optional<double> scale,
                                     bool is_causal, bool deterministic) {
  BackwardParams p;
  Gather gather;
  const std::optional<StableTensor> none;
  const Arguments args{query, key, value, nullptr, none, scale, is_causal, -1, -1, kOperator};
  const bool once = read(args,
                         {{"query_indices", "query_offsets", query_indices, query_offsets},
                          {"key_indices", "key_offsets", key_indices, key_offsets},
                          memory_key,
                          memory_value,
                          score,
                          bias_rule,
                          bias_value},
                         p, gather);
  p.grad_output = read_output("grad_output", grad_output, args);
  const Tensor whole_output = read_output("output", output, args);
  if (once) p.output = whole_output;
  for (const auto& [name, x] : {std::pair("logsumexp", &logsumexp), std::pair("grad_logsumexp", &grad_logsumexp)}) {
    check_dtype(name, *x, sum_type(query), "");
    check_shape(name, *x, {query_indices.size(0), query_indices.size(1), query_indices.size(2)});
    check_device(name, *x, query);
    check(x->is_contiguous(), name, ": expected a contiguous tensor, got one with other strides");
  }
  if (p.score == Score::kSoftmax) {
    p.logsumexp = {logsumexp.data_ptr(), 0, 0, 1};
    p.grad_logsumexp = {grad_logsumexp.data_ptr(), 0, 0, 1};
  }
  StableTensor grad_query = empty_rows(query, p.head_dim), grad_key = empty_rows(key, p.head_dim);
  StableTensor grad_value = empty_rows(value, p.value_dim);
  p.grad_query = view_rows(grad_query);
  p.grad_key = view_rows(grad_key);
  p.grad_value = view_rows(grad_value);
  StableTensor grad_memory_key = torch::stable::new_empty(query, std::vector{p.heads_k, gather.memory, p.head_dim});
  StableTensor grad_memory_value = torch::stable::new_empty(query, std::vector{p.heads_k, gather.memory, p.value_dim});
  p.grad_memory_key = view_memory(grad_memory_key);
  p.grad_memory_value = view_memory(grad_memory_value);
  run(p, query, deterministic);
  return {grad_query, grad_key, grad_value, grad_memory_key, grad_memory_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnx, m) {
  m.def(
      "routing_attention(Tensor query, Tensor key, Tensor value, Tensor query_indices, Tensor query_offsets, "
      "Tensor key_indices, Tensor key_offsets, Tensor? memory_key, Tensor? memory_value, str score, str bias_rule, "
      "float bias_value, float? scale, bool is_causal) -> (Tensor output, Tensor logsumexp)");
  m.def(
      "routing_attention_backward(Tensor grad_output, Tensor grad_logsumexp, Tensor query, Tensor key, Tensor value, "
      "Tensor output, Tensor logsumexp, Tensor query_indices, Tensor query_offsets, Tensor key_indices, "
      "Tensor key_offsets, Tensor? memory_key, Tensor? memory_value, str score, str bias_rule, float bias_value, "
      "float? scale, bool is_causal, bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_memory_key, Tensor grad_memory_value)");
}

// CUDA has no kernel yet, nor has the emulator: there the table's refusal answers.
STABLE_TORCH_LIBRARY_IMPL(attnx, CPU, m) {
  if (kCudaOnHost) return;
  m.impl("routing_attention", TORCH_BOX(&routing_attention));
  m.impl("routing_attention_backward", TORCH_BOX(&routing_attention_backward));
}

}  // namespace attnx::ops
