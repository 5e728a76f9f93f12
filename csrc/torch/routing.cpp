// This file registers torch.ops.attnx.routing_attention and its backward: attention within clusters of rows. The method
// is that of Roy et al., arXiv 2003.05997.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "results.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "routing_attention";

struct Routes {
  StableTensor query_indices, query_offsets, key_indices, key_offsets;
  std::optional<StableTensor> lead;
  ATTNX_FIELDS(query_indices, query_offsets, key_indices, key_offsets, lead)
};

struct Memory {
  std::optional<StableTensor> memory_key, memory_value;
  ATTNX_FIELDS(memory_key, memory_value)
};
struct MemoryGradients {
  StableTensor grad_memory_key, grad_memory_value;
  ATTNX_FIELDS(grad_memory_key, grad_memory_value)
};

struct Lists {
  const char *indices_name, *offsets_name;
  const StableTensor &indices, &offsets;
};

// These are only bounds where values are not read.
struct LongestAndCounts {
  std::int64_t longest;  // no cluster is longer
  bool once;             // no row is in two clusters
};

// It checks that clusters are lists of ascending rows.
LongestAndCounts read_clusters(const Lists& lists, const AttentionParams& p, std::int64_t rows, const char* rows_name,
                               Clusters& clusters) {
  const std::int64_t heads = p.batch * p.heads_q;
  for (const auto& [name, x] :
       {std::pair(lists.indices_name, &lists.indices), std::pair(lists.offsets_name, &lists.offsets)}) {
    check_dtype(name, *x, ScalarType::Int, "");
    check_contiguous(name, *x);
  }
  check(lists.offsets.dim() == 3 && lists.offsets.size(0) == p.batch && lists.offsets.size(1) == p.heads_q &&
            lists.offsets.size(2) >= 2,
        lists.offsets_name, ": expected shape (", p.batch, ", ", p.heads_q, ", clusters + 1), got ",
        shape_of(lists.offsets));
  check(lists.indices.dim() == 3 && lists.indices.size(0) == p.batch && lists.indices.size(1) == p.heads_q,
        lists.indices_name, ": expected shape (", p.batch, ", ", p.heads_q, ", slots), got ", shape_of(lists.indices));
  const std::int64_t count = lists.offsets.size(2) - 1, slots = lists.indices.size(2);
  clusters.indices = data<const std::int32_t>(lists.indices);
  clusters.offsets = data<const std::int32_t>(lists.offsets);
  clusters.slots = slots;
  clusters.rows = rows;
  const auto indices = values_on_host(lists.indices), offsets = values_on_host(lists.offsets);
  if (!indices || !offsets) return {std::min(slots, rows), false};
  LongestAndCounts result{0, true};
  std::vector<bool> seen;
  for (std::int64_t head = 0; head < heads; ++head) {
    const auto* offset = data<const std::int32_t>(*offsets) + head * (count + 1);
    const auto* index = data<const std::int32_t>(*indices) + head * slots;
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

Tensor view_memory(const StableTensor& x) { return {x.data_ptr(), 0, x.stride(0), x.stride(1)}; }

void check_memory(const char* name, const StableTensor& x, std::int64_t dim, const AttentionParams& p,
                  const StableTensor& query) {
  check_dtype(name, x, query.scalar_type(), " like query");
  check(x.dim() == 3, name, ": expected 3 dimensions, (kv_heads, memory, dim), got shape ", shape_of(x));
  check_shape(name, x, {p.heads_k, x.size(1), dim});
  check_layout(name, x);
}

void read_memory(const Memory& memory, const AttentionParams& p, const StableTensor& query, Gather& g) {
  const auto& [key, value] = memory;
  check(key.has_value() == value.has_value(), "memory_key, memory_value: expected both or none, got one");
  if (!key) return;
  check_memory("memory_key", *key, p.head_dim, p, query);
  check_memory("memory_value", *value, p.value_dim, p, query);
  g.memory = key->size(1);
  check_shape("memory_value", *value, {p.heads_k, g.memory, p.value_dim});
  g.memory_key = view_memory(*key);
  g.memory_value = view_memory(*value);
}

void read_lead(const std::optional<StableTensor>& lead, const AttentionParams& p, Gather& g) {
  if (!lead) return;
  check_dtype("lead", *lead, ScalarType::Int, "");
  check(lead->dim() == 2 && lead->size(0) == p.batch && lead->size(1) >= 1 && g.clusters % lead->size(1) == 0,
        "lead: expected shape (", p.batch, ", sequences), the latter a divisor of the ", g.clusters, " clusters, got ",
        shape_of(*lead));
  check_contiguous("lead", *lead);
  g.sequences = lead->size(1);
  g.leads = data<const std::int32_t>(*lead);
}

// It returns whether no query is in two clusters.
bool read(const Target& target, const Inputs& x, const Routes& routes, const Memory& memory,
          const ScoreOptions& options, const Causal& causal, AttentionParams& p, Gather& g) {
  read_score(options, p);
  read_inputs(target, x, Dense(), p);
  read_window(causal, p);
  p.gather = &g;
  const auto queries = read_clusters({"query_indices", "query_offsets", routes.query_indices, routes.query_offsets}, p,
                                     p.length_q, "query", g.queries);
  const auto keys = read_clusters({"key_indices", "key_offsets", routes.key_indices, routes.key_offsets}, p, p.length_k,
                                  "key", g.keys);
  g.clusters = routes.query_offsets.size(2) - 1;
  check_shape("key_offsets", routes.key_offsets, {p.batch, p.heads_q, g.clusters + 1});
  read_lead(routes.lead, p, g);
  read_memory(memory, p, x.query, g);
  constexpr std::int64_t kMostKeys = std::numeric_limits<std::int32_t>::max();
  check(g.keys.slots <= kMostKeys && g.memory <= (kMostKeys - g.keys.slots) / g.clusters,
        "memory_key: expected at most ", kMostKeys, " keys in all clusters, got ", g.keys.slots, " and ", g.memory,
        " more in each of ", g.clusters);
  p.length_q = queries.longest;
  p.length_k = keys.longest + g.memory;
  return queries.once;
}

Outputs forward(const Inputs& x, const Routes& routes, const Memory& memory, const ScoreOptions& options,
                const Causal& causal) {
  const Target target{kSystem, x.query};
  ForwardParams p;
  Gather gather;
  read(target, x, routes, memory, options, causal, p, gather);
  // Slots that a head does not use hold 0.
  Outputs y{empty_rows(x.query, p.value_dim), make_zeros(x.query, routes.query_indices.sizes(), sum_type(x.query))};
  p.output = view_rows(y.output);
  if (is_normalised(p.score)) p.logsumexp = {y.logsumexp.data_ptr(), 0, 0, 1};
  run(p, target);
  return y;
}

Tensor read_slots(const char* name, const StableTensor& x, const Routes& routes, const StableTensor& query) {
  const StableTensor& slots = routes.query_indices;
  check_dtype(name, x, sum_type(query), "");
  check_shape(name, x, {slots.size(0), slots.size(1), slots.size(2)});
  check_contiguous(name, x);
  return {x.data_ptr(), 0, 0, 1};
}

std::tuple<InputGradients, MemoryGradients> backward(const OutputGradients& gradients, const Inputs& x,
                                                     const Outputs& y, const Routes& routes, const Memory& memory,
                                                     const ScoreOptions& options, const Causal& causal,
                                                     const Deterministic& option) {
  const Target target{kSystem, x.query, option.deterministic};
  BackwardParams p;
  Gather gather;
  const bool once = read(target, x, routes, memory, options, causal, p, gather);
  p.grad_output = read_output("grad_output", gradients.grad_output, x);
  const Tensor whole_output = read_output("output", y.output, x);
  if (once) p.output = whole_output;
  const Tensor logsumexp = read_slots("logsumexp", y.logsumexp, routes, x.query);
  const Tensor grad_logsumexp = read_slots("grad_logsumexp", gradients.grad_logsumexp, routes, x.query);
  if (is_normalised(p.score)) {
    p.logsumexp = logsumexp;
    p.grad_logsumexp = grad_logsumexp;
  }
  const InputGradients of_inputs = empty_gradients(x, p);
  const MemoryGradients of_memory{make_empty(x.query, std::vector{p.heads_k, gather.memory, p.head_dim}),
                                  make_empty(x.query, std::vector{p.heads_k, gather.memory, p.value_dim})};
  p.grad_memory_key = view_memory(of_memory.grad_memory_key);
  p.grad_memory_value = view_memory(of_memory.grad_memory_value);
  run(p, target);
  return {of_inputs, of_memory};
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<forward>("routing_attention"), define<backward>("routing_attention_backward")});

}  // namespace

}  // namespace attnx::ops
