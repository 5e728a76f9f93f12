// Routing attention: the loop over clusters, for a few heads at a time, and then its epilogue, which adds up what
// the clusters have for each row. Nothing of size length x clusters is kept, and nothing is gathered in memory; what
// the loop leaves for a head is as large as its output, in the type of sums, and the next heads use the same memory.
#pragma once

#include "../backward.h"
#include "../forward.h"
#include "../lanes/queries.h"
#include "../tiles/clustered.h"
#include "places.h"

namespace attnx::cpu::ATTNX_ISA {

// The heads of one run of the loop: whole groups that share a key head, enough of them to keep all threads busy.
inline std::int64_t heads_of_run(const AttentionParams& p, const Executor& executor) {
  constexpr std::int64_t kClustersOfThread = 32;
  const std::int64_t enough = (kClustersOfThread * executor.threads + p.gather->clusters - 1) / p.gather->clusters;
  return smaller(round_up(enough, p.heads_q / p.heads_k), p.batch * p.heads_q);
}

template <class Run>
inline void for_each_run(const AttentionParams& p, std::int64_t heads, const Run& run) {
  const std::int64_t all = p.batch * p.heads_q;
  for (std::int64_t first = 0; first < all; first += heads) run(first, smaller(heads, all - first));
}

inline constexpr std::int64_t kRowsOfUnit = 256;
inline std::int64_t row_units(std::int64_t rows) { return (rows + kRowsOfUnit - 1) / kRowsOfUnit; }

template <class Input, class Score>
class RoutedForward {
  using Sum = typename Arithmetic<Input>::Sum;
  using Loop = Forward<Input, Score, ClusteredTiles, GatheredStorage, QueriesOnLanes>;

 public:
  RoutedForward(const ForwardParams& p, const Executor& executor)
      : p_(p), executor_(executor), heads_(heads_of_run(p, executor)) {}

  std::int64_t workspace_bytes() const { return Memory(*this, nullptr).bytes; }

  void run(char* workspace) const {
    const Memory m(*this, workspace);
    for_each_run(p_, heads_, [&](std::int64_t first, std::int64_t heads) {
      Gather gather;
      const ForwardParams part = of_heads(m, first, heads, gather);
      for_each_unit(executor_, heads, nullptr, 0,
                    [&](std::int64_t head, char*) { m.places.fill(head, first + head, 0); });
      Loop(part, executor_).run(m.loop);
      const std::int64_t units = row_units(p_.gather->queries.rows);
      for_each_unit(executor_, heads * units, nullptr, 0,
                    [&](std::int64_t unit, char*) { store_means(m, first, unit / units, unit % units * kRowsOfUnit); });
    });
  }

 private:
  struct Memory {
    Sum* outputs;  // [heads, slots, value_dim]
    Places places;
    char* loop;
    std::int64_t bytes;

    Memory(const RoutedForward& f, char* block) : Memory(f, Arena(block)) {}
    Memory(const RoutedForward& f, Arena arena)
        : outputs(arena.take<Sum>(f.heads_ * f.p_.gather->queries.slots * f.p_.value_dim)),
          places(arena, f.p_.gather->queries, f.p_.gather->clusters, f.heads_) {
      Gather gather;
      const std::int64_t size = Loop(f.of_heads(*this, 0, f.heads_, gather), f.executor_).workspace_bytes();
      loop = arena.take<char>(size);
      bytes = arena.used();
    }
  };

  ForwardParams of_heads(const Memory& m, std::int64_t first, std::int64_t heads, Gather& gather) const {
    gather = *p_.gather;
    gather.first_head = first;
    gather.heads = heads;
    ForwardParams part = p_;
    part.gather = &gather;
    part.output = {m.outputs, 0, 0, p_.value_dim};
    if (part.logsumexp.data)
      part.logsumexp = {row_of<Sum>(p_.logsumexp, 0, 0, first * p_.gather->queries.slots), 0, 0, 1};
    return part;
  }

  void store_means(const Memory& m, std::int64_t first, std::int64_t head, std::int64_t row0) const {
    const std::int64_t all = first + head, slots = p_.gather->queries.slots;
    const Sum* outputs = m.outputs + head * slots * p_.value_dim;
    for (std::int64_t row = row0; row < smaller(row0 + kRowsOfUnit, p_.gather->queries.rows); ++row) {
      Sum sum[kMaxHeadDim];
      set_zero(sum, p_.value_dim);
      const std::int64_t count = m.places.add(head, row, outputs, p_.value_dim, p_.value_dim, sum);
      for (std::int64_t d = 0; d < p_.value_dim && count > 1; ++d) sum[d] /= Sum(count);
      convert_row(row_of<Input>(p_.output, all / p_.heads_q, all % p_.heads_q, row), sum, p_.value_dim);
    }
  }

  const ForwardParams& p_;
  const Executor& executor_;
  std::int64_t heads_;
};

template <class Input, class Score>
class RoutedBackward {
  using Sum = typename Arithmetic<Input>::Sum;
  using Loop = Backward<Input, Score, ClusteredTiles, GatheredStorage>;

 public:
  RoutedBackward(const BackwardParams& p, const Executor& executor)
      : p_(p),
        executor_(executor),
        heads_(heads_of_run(p, executor)),
        group_(p.heads_q / p.heads_k),
        head_lanes_(round_up(p.head_dim, kLanes<Sum>)),
        value_lanes_(round_up(p.value_dim, kLanes<Sum>)) {}

  std::int64_t workspace_bytes() const { return Memory(*this, nullptr).bytes; }

  void run(char* workspace) const {
    const Memory m(*this, workspace);
    const Gather& g = *p_.gather;
    __builtin_memset(m.memory_key, 0, std::size_t(p_.heads_k * g.memory * p_.head_dim) * sizeof(Sum));
    __builtin_memset(m.memory_value, 0, std::size_t(p_.heads_k * g.memory * p_.value_dim) * sizeof(Sum));
    for_each_run(p_, heads_, [&](std::int64_t first, std::int64_t heads) {
      Gather gather;
      const BackwardParams part = of_heads(m, first, heads, gather);
      for_each_unit(executor_, 2 * heads, nullptr, 0, [&](std::int64_t unit, char*) {
        const std::int64_t head = unit / 2;
        unit % 2 ? m.keys.fill(head, first + head, g.memory) : m.queries.fill(head, first + head, 0);
      });
      Loop(part, executor_).run(m.loop);
      const std::int64_t query_units = row_units(g.queries.rows), key_units = row_units(g.keys.rows);
      const std::int64_t of_queries = heads * query_units;
      for_each_unit(executor_, of_queries + heads / group_ * key_units, nullptr, 0, [&](std::int64_t unit, char*) {
        if (unit < of_queries) return store_queries(m, first, unit / query_units, unit % query_units * kRowsOfUnit);
        unit -= of_queries;
        store_keys(m, first, unit / key_units * group_, unit % key_units * kRowsOfUnit);
      });
      for (std::int64_t head = 0; head < heads; ++head) add_memory(m, first, head);
    });
    store_memory(m.memory_key, p_.head_dim, Sum(p_.scale), p_.grad_memory_key);
    store_memory(m.memory_value, p_.value_dim, 1, p_.grad_memory_value);
  }

 private:
  struct Memory {
    Sum* grad_queries;               // [heads, slots, head_dim]
    Sum *grad_keys, *grad_values;    // [heads, key_sums, lanes]
    Sum *memory_key, *memory_value;  // [heads_k, memory, dim]
    Places queries, keys;
    char* loop;
    std::int64_t bytes;

    Memory(const RoutedBackward& f, char* block) : Memory(f, Arena(block)) {}
    Memory(const RoutedBackward& f, Arena arena)
        : grad_queries(arena.take<Sum>(f.heads_ * f.p_.gather->queries.slots * f.p_.head_dim)),
          grad_keys(arena.take<Sum>(f.heads_ * f.key_sums() * f.head_lanes_)),
          grad_values(arena.take<Sum>(f.heads_ * f.key_sums() * f.value_lanes_)),
          memory_key(arena.take<Sum>(f.p_.heads_k * f.p_.gather->memory * f.p_.head_dim)),
          memory_value(arena.take<Sum>(f.p_.heads_k * f.p_.gather->memory * f.p_.value_dim)),
          queries(arena, f.p_.gather->queries, f.p_.gather->clusters, f.heads_),
          keys(arena, f.p_.gather->keys, f.p_.gather->clusters, f.heads_) {
      Gather gather;
      const std::int64_t size = Loop(f.of_heads(*this, 0, f.heads_, gather), f.executor_).workspace_bytes();
      loop = arena.take<char>(size);
      bytes = arena.used();
    }
  };

  // Of a head.
  std::int64_t key_sums() const { return p_.gather->keys.slots + p_.gather->clusters * p_.gather->memory; }

  BackwardParams of_heads(const Memory& m, std::int64_t first, std::int64_t heads, Gather& gather) const {
    gather = *p_.gather;
    gather.first_head = first;
    gather.heads = heads;
    gather.query_starts = m.queries.starts;
    BackwardParams part = p_;
    part.gather = &gather;
    part.grad_query = {m.grad_queries, 0, 0, p_.head_dim};
    part.key_sums = m.grad_keys;
    part.value_sums = m.grad_values;
    const std::int64_t slot = first * p_.gather->queries.slots;
    if (part.logsumexp.data) {
      part.logsumexp = {row_of<Sum>(p_.logsumexp, 0, 0, slot), 0, 0, 1};
      part.grad_logsumexp = {row_of<Sum>(p_.grad_logsumexp, 0, 0, slot), 0, 0, 1};
    }
    part.grad_bias = part.grad_alibi_slopes = part.grad_sink = nullptr;
    return part;
  }

  void store_queries(const Memory& m, std::int64_t first, std::int64_t head, std::int64_t row0) const {
    const std::int64_t all = first + head;
    const Sum* from = m.grad_queries + head * p_.gather->queries.slots * p_.head_dim;
    for (std::int64_t row = row0; row < smaller(row0 + kRowsOfUnit, p_.gather->queries.rows); ++row) {
      Sum sum[kMaxHeadDim];
      set_zero(sum, p_.head_dim);
      m.queries.add(head, row, from, p_.head_dim, p_.head_dim, sum);
      convert_row(row_of<Input>(p_.grad_query, all / p_.heads_q, all % p_.heads_q, row), sum, p_.head_dim);
    }
  }

  // Of the key head whose first query head is `head`.
  void store_keys(const Memory& m, std::int64_t first, std::int64_t head, std::int64_t row0) const {
    const std::int64_t batch = (first + head) / p_.heads_q, key_head = (first + head) % p_.heads_q / group_;
    for (std::int64_t row = row0; row < smaller(row0 + kRowsOfUnit, p_.gather->keys.rows); ++row) {
      Sum key[kMaxHeadDim], value[kMaxHeadDim];
      set_zero(key, p_.head_dim);
      set_zero(value, p_.value_dim);
      for (std::int64_t h = head; h < head + group_; ++h) {
        m.keys.add(h, row, m.grad_keys + h * key_sums() * head_lanes_, head_lanes_, p_.head_dim, key);
        m.keys.add(h, row, m.grad_values + h * key_sums() * value_lanes_, value_lanes_, p_.value_dim, value);
      }
      for (std::int64_t d = 0; d < p_.head_dim; ++d) key[d] *= Sum(p_.scale);
      convert_row(row_of<Input>(p_.grad_key, batch, key_head, row), key, p_.head_dim);
      convert_row(row_of<Input>(p_.grad_value, batch, key_head, row), value, p_.value_dim);
    }
  }

  void add_memory(const Memory& m, std::int64_t first, std::int64_t head) const {
    const Gather& g = *p_.gather;
    const std::int64_t key_head = (first + head) % p_.heads_q / group_;
    const std::int32_t* offsets = g.keys.offsets + (first + head) * (g.clusters + 1);
    const auto add = [&](const Sum* sums, std::int64_t lanes, std::int64_t dim, Sum* to) {
      for (std::int64_t c = 0; c < g.clusters; ++c) {
        for (std::int64_t i = 0; i < g.memory; ++i) {
          const Sum* row = sums + (head * key_sums() + offsets[c] + c * g.memory + i) * lanes;
          for (std::int64_t d = 0; d < dim; ++d) to[(key_head * g.memory + i) * dim + d] += row[d];
        }
      }
    };
    add(m.grad_keys, head_lanes_, p_.head_dim, m.memory_key);
    add(m.grad_values, value_lanes_, p_.value_dim, m.memory_value);
  }

  void store_memory(const Sum* from, std::int64_t dim, Sum factor, const Tensor& to) const {
    for (std::int64_t i = 0; i < p_.heads_k * p_.gather->memory; ++i) {
      Sum row[kMaxHeadDim];
      for (std::int64_t d = 0; d < dim; ++d) row[d] = from[i * dim + d] * factor;
      convert_row(row_of<Input>(to, 0, i / p_.gather->memory, i % p_.gather->memory), row, dim);
    }
  }

  const BackwardParams& p_;
  const Executor& executor_;
  std::int64_t heads_, group_, head_lanes_, value_lanes_;
};

}  // namespace attnx::cpu::ATTNX_ISA
