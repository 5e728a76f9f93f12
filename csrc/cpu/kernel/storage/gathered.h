// Rows that lists of indices pick out of strided tensors: the clusters of routing attention. A cluster is to the loop
// what a packed sequence is; its keys are those that every cluster sees, the memory, and then its own.
#pragma once

#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

// One cluster of one head. Results of the loop, one for each query in each cluster, lie in the order of the clusters
// from the run's first head on; so do the sums for each key, the memory's before those of the cluster.
struct GatheredSequence {
  std::int64_t batch, first_head, length_q, length_k, memory;
  std::int64_t first_result, first_key_sum;
  std::int64_t lead;  // under a causal mask query row i sees the key rows up to i + lead

  GatheredSequence(const AttentionParams& p, std::int64_t index) : memory(p.gather->memory) {
    const Gather& g = *p.gather;
    const std::int64_t head = index / g.clusters, cluster = index % g.clusters, all = g.first_head + head;
    const std::int32_t* q = g.queries.offsets + all * (g.clusters + 1) + cluster;
    const std::int32_t* k = g.keys.offsets + all * (g.clusters + 1) + cluster;
    batch = all / p.heads_q;
    first_head = all % p.heads_q;
    length_q = q[1] - q[0];
    length_k = memory + k[1] - k[0];
    queries_ = g.queries.indices + all * g.queries.slots + q[0];
    keys_ = g.keys.indices + all * g.keys.slots + k[0];
    starts_ = g.query_starts ? g.query_starts + head * (g.queries.rows + 1) : nullptr;
    lead = g.leads ? g.leads[batch * g.sequences + cluster / (g.clusters / g.sequences)] : g.keys.rows - g.queries.rows;
    first_result = head * g.queries.slots + q[0];
    first_key_sum = head * (g.keys.slots + g.clusters * memory) + k[0] + cluster * memory;
  }

  std::int64_t query_row(std::int64_t i) const { return queries_[i]; }
  std::int64_t key_row(std::int64_t i) const { return keys_[i - memory]; }  // of those after the memory
  std::int64_t result_row(std::int64_t i) const { return first_result + i; }

  // Divides a row of the output's gradient by the number of clusters that the output is a mean over.
  template <class Element>
  void take_share(std::int64_t i, Element* row, std::int64_t dim) const {
    const std::int32_t* start = starts_ + query_row(i);
    if (start[1] - start[0] == 1) return;
    const auto share = decltype(to_float(row[0]))(1) / decltype(to_float(row[0]))(start[1] - start[0]);
    for (std::int64_t d = 0; d < dim; ++d) row[d] = from_float<Element>(to_float(row[d]) * share);
  }

 private:
  const std::int32_t *queries_, *keys_, *starts_;
};

template <class Input, class A>
class GatheredStorage {
 public:
  using Element = typename A::Element;
  using Sequence = GatheredSequence;
  using Result = typename A::Sum;  // to be added up over clusters
  static constexpr bool kGathered = true, kSteps = false;

  static std::int64_t sequences(const AttentionParams& p) { return p.gather->heads * p.gather->clusters; }

  GatheredStorage(const AttentionParams& p, const Sequence& s, std::int64_t key_head)
      : sequence_(s),
        key_{row_of<const Input>(p.key, s.batch, key_head, 0), p.key.row_stride, p.head_dim},
        value_{row_of<const Input>(p.value, s.batch, key_head, 0), p.value.row_stride, p.value_dim},
        memory_key_{row_of<const Input>(p.gather->memory_key, 0, key_head, 0), p.gather->memory_key.row_stride,
                    p.head_dim},
        memory_value_{row_of<const Input>(p.gather->memory_value, 0, key_head, 0), p.gather->memory_value.row_stride,
                      p.value_dim} {}

  // Both load count rows from the given one as [rows][stride].
  void load_keys(std::int64_t first, std::int64_t count, Element* to, std::int64_t stride) const {
    load(key_, memory_key_, first, count, to, stride);
  }
  void load_values(std::int64_t first, std::int64_t count, Element* to, std::int64_t stride) const {
    load(value_, memory_value_, first, count, to, stride);
  }
  void prefetch(std::int64_t first, std::int64_t count) const {
    const std::int64_t end = smaller(first + count, sequence_.length_k);
    for (std::int64_t i = larger(first, sequence_.memory); i < end; ++i) {
      prefetch_rows(key_.row(sequence_.key_row(i)), 1, key_.dim, 0);
      prefetch_rows(value_.row(sequence_.key_row(i)), 1, value_.dim, 0);
    }
  }

 private:
  struct Table {
    const Input* data;
    std::int64_t stride, dim;

    const Input* row(std::int64_t i) const { return data + i * stride; }
  };

  void load(const Table& own, const Table& memory, std::int64_t first, std::int64_t count, Element* to,
            std::int64_t stride) const {
    load_rows<A>(
        [&](std::int64_t i) {
          i += first;
          return i < sequence_.memory ? memory.row(i) : own.row(sequence_.key_row(i));
        },
        count, own.dim, to, stride);
  }

  const Sequence& sequence_;
  Table key_, value_, memory_key_, memory_value_;
};

}  // namespace attnx::cpu::ATTNX_ISA
