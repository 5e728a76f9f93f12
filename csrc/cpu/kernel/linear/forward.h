// Linear attention over a scope of blocks, forward. For each head of keys
//
//     h_j = phi(K_j)^T [V_j, 1]      H_i = sum of the h_j in the scope of i      [N, n] = phi(Q_i) H_i      O = N / n
//
// Blocks of keys that only some queries of a block see add phi(Q) phi(K)^T, masked, times [V, 1].
#pragma once

#include "../phases.h"
#include "operands.h"

namespace attnx::cpu::ATTNX_ISA {

inline constexpr std::int64_t kRowBlocks = 16;  // summed together: each slice of the blocks is read once for them

template <class Input>
class LinearForward {
  using Operands = LinearOperands<Input>;
  using Sum = typename Operands::Sum;
  using Terms = typename Operands::Terms;

 public:
  LinearForward(const LinearForwardParams& p, const Executor& executor)
      : p_(p),
        x_(p),
        blocks_((p.length_k + p.block_k - 1) / p.block_k),
        heads_(p.batch * p.heads_k, executor,
               BlockSums<Sum>(nullptr, blocks_, elements()).total() * std::int64_t(sizeof(Sum))) {}

  std::int64_t workspace_bytes() const { return heads_.workspace_bytes(shared_bytes(), worker_bytes()); }

  void run(char* workspace) const {
    heads_.run(workspace, shared_bytes(), worker_bytes(),
               [&](std::int64_t head, const Executor& executor, char* memory, char* workers) {
                 run_heads(head, executor, Shared(*this, memory), workers);
               });
  }

 private:
  enum Kind { kSum, kAttend, kAddUp };  // of a phase

  struct Shared {
    Phases phases;
    Sum* sums[2];
    std::int64_t bytes;

    Shared(const LinearForward& f, char* memory) : Shared(f, Arena(memory)) {}

   private:
    Shared(const LinearForward& f, Arena arena) : phases(arena, 3 * (f.heads_.together() + 1), 2) {
      for (std::int64_t i = 0; i < smaller<std::int64_t>(f.heads_.together(), 2); ++i)
        sums[i] = arena.take<Sum>(BlockSums<Sum>(nullptr, f.blocks_, f.elements()).total());
      bytes = arena.used();
    }
  };

  struct Buffers {
    Sum *query, *key, *key_by_feature, *value, *output, *products, *sums;
    std::int32_t* rows;
    std::int64_t bytes;

    Buffers(const LinearForward& f, char* memory) {
      const Operands& x = f.x_;
      Arena arena(memory);
      query = arena.take<Sum>(x.rows_size(f.p_.block_q, x.head_lanes));
      key = arena.take<Sum>(x.rows_size(f.p_.block_k, x.head_lanes));
      key_by_feature = arena.take<Sum>(f.p_.head_dim * x.key_lanes);
      value = arena.take<Sum>(x.rows_size(f.p_.block_k, x.value_lanes));
      output = arena.take<Sum>(x.rows_size(f.p_.block_q, x.value_lanes));
      products = arena.take<Sum>(x.rows_size(f.p_.block_q, x.key_lanes));
      sums = arena.take<Sum>(kRowBlocks * BlockSums<Sum>(nullptr, f.blocks_, f.elements()).size());
      rows = arena.take<std::int32_t>(kRowBlocks * (f.blocks_ + 1));
      bytes = arena.used();
    }
  };

  std::int64_t elements() const { return p_.head_dim * x_.value_lanes; }
  std::int64_t shared_bytes() const { return Shared(*this, nullptr).bytes; }
  std::int64_t worker_bytes() const { return Buffers(*this, nullptr).bytes; }

  // Each head of keys has three phases: the h_j, their prefixes, and outputs. Two heads have memory, so that the h_j of
  // a head are made before the outputs of the one before it: a phase needs all but its predecessor.
  void run_heads(std::int64_t first, const Executor& executor, const Shared& shared, char* workers) const {
    // Phase 3 i + 1 is about the head before that of the others.
    const auto of = [](std::int64_t phase) { return phase / 3 - (phase % 3 == kAttend); };
    const auto batches = [&](const Sequence& s) { return (x_.query_blocks(s) + kRowBlocks - 1) / kRowBlocks; };
    const auto sums_of = [&](const Sequence& s, std::int64_t head) {
      return BlockSums<Sum>(shared.sums[head % 2], x_.key_blocks(s), elements());
    };
    shared.phases.run(
        executor,
        [&](std::int64_t phase) -> std::int64_t {
          const std::int64_t head = of(phase);
          if (head < 0 || head == heads_.together()) return 0;
          const Sequence s(p_, (first + head) / p_.heads_k);
          if (phase % 3 == kSum) return x_.key_blocks(s);
          return phase % 3 == kAttend ? batches(s) * x_.group : sums_of(s, head).slices();
        },
        [&](std::int64_t phase, std::int64_t unit, int worker) {
          const std::int64_t head = of(phase), key_head = (first + head) % p_.heads_k;
          const Sequence s(p_, (first + head) / p_.heads_k);
          const BlockSums<Sum> sums = sums_of(s, head);
          if (phase % 3 == kAddUp) return sums.add_up(unit);
          const Buffers b(*this, workers + worker * worker_bytes());
          if (phase % 3 == kSum) return sum_block(s, key_head, unit, sums, b);
          attend(s, key_head * x_.group + unit / batches(s), unit % batches(s) * kRowBlocks, sums, b);
        });
  }

  void sum_block(const Sequence& s, std::int64_t key_head, std::int64_t block, const BlockSums<Sum>& sums,
                 const Buffers& b) const {
    const auto keys = x_.keys(s, block);
    x_.load_keys(s, key_head, keys, b.key);
    x_.load_values(s, key_head, keys, b.value);
    x_.multiply_transposed(b.key, x_.head_lanes, b.value, x_.value_lanes, sums.block(block), p_.head_dim, keys.count,
                           false);
  }

  void attend(const Sequence& s, std::int64_t head, std::int64_t first, const BlockSums<Sum>& sums,
              const Buffers& b) const {
    const std::int64_t count = smaller(kRowBlocks, x_.query_blocks(s) - first);
    Terms terms[kRowBlocks];
    for (std::int64_t i = 0; i < count; ++i) {
      terms[i].rows = b.rows + i * (blocks_ + 1);
      const std::int8_t* const labels = x_.labels(s, head, first + i);
      sums.choose(x_.seen_by_all(s, first + i), [&](std::int64_t key) { return x_.in_scope(labels[key]); }, terms[i]);
    }
    sums.sum(terms, count, b.sums, false);
    for (std::int64_t i = 0; i < count; ++i) attend_block(s, head, first + i, b.sums + i * sums.size(), b);
  }

  void attend_block(const Sequence& s, std::int64_t head, std::int64_t block, const Sum* sum, const Buffers& b) const {
    const auto rows = x_.queries(s, block);
    x_.load_queries(s, head, rows, b.query);
    x_.multiply(b.query, x_.head_lanes, sum, x_.value_lanes, b.output, rows.count, p_.head_dim, false);
    for (std::int64_t j = x_.seen_by_all(s, block); j < x_.seen_by_some(s, block); ++j) {
      if (!x_.in_scope(x_.labels(s, head, block)[j])) continue;
      const auto keys = x_.keys(s, j);
      x_.load_keys(s, head / x_.group, keys, b.key);
      x_.load_values(s, head / x_.group, keys, b.value);
      x_.transpose(b.key, x_.head_lanes, keys.count, p_.head_dim, b.key_by_feature, x_.key_lanes);
      x_.multiply(b.query, x_.head_lanes, b.key_by_feature, x_.key_lanes, b.products, rows.count, p_.head_dim, false);
      x_.hide(s, rows, keys, b.products);
      x_.multiply(b.products, x_.key_lanes, b.value, x_.value_lanes, b.output, rows.count, keys.count, true);
    }
    for (std::int64_t i = 0; i < rows.count; ++i) {
      Sum* const row = b.output + i * x_.value_lanes;
      const Sum n = row[p_.value_dim], factor = n == 0 ? 0 : 1 / n;
      for (std::int64_t d = 0; d < p_.value_dim; ++d) row[d] *= factor;
      convert_row(row_of<Input>(p_.output, s.batch, head, s.first_q + rows.first + i), row, p_.value_dim);
    }
  }

  const LinearForwardParams& p_;
  Operands x_;
  std::int64_t blocks_;  // of the longest sequence
  HeadsInPhases heads_;
};

}  // namespace attnx::cpu::ATTNX_ISA
