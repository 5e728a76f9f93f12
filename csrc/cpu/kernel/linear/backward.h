// Linear attention over a scope of blocks, backward. With [N, n] = phi(Q) H and O = N / n, the gradient of [N, n] is
// G = [dO, -rowsum(dO O)] / n, and for each head of keys
//
//     dphi(Q_i) = G_i H_i^T      D_j = sum of phi(Q_i)^T G_i over the i whose scope holds j
//     dphi(K_j) = [V_j, 1] D_j^T      d[V_j, 1] = phi(K_j) D_j
//
// (arXiv 2509.24006, appendix, with z as a column of H), then through phi. Sums over blocks of queries are taken from
// the last to the first: under a causal mask what sees a block of keys is then a prefix. Blocks that only some queries
// of a block see add the same terms pair by pair. Results do not depend on who ran first.
#pragma once

#include "forward.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class LinearBackward {
  using Operands = LinearOperands<Input>;
  using Sum = typename Operands::Sum;
  using Terms = typename Operands::Terms;
  using Range = typename Operands::Range;

 public:
  LinearBackward(const LinearBackwardParams& p, const Executor& executor)
      : p_(p),
        x_(p),
        query_blocks_((p.length_q + p.block_q - 1) / p.block_q),
        key_blocks_((p.length_k + p.block_k - 1) / p.block_k),
        heads_(p.batch * p.heads_k, executor,
               (2 * key_blocks_ + query_blocks_) * elements() * std::int64_t(sizeof(Sum))) {}

  std::int64_t workspace_bytes() const { return heads_.workspace_bytes(shared_bytes(), worker_bytes()); }

  void run(char* workspace) const {
    heads_.run(workspace, shared_bytes(), worker_bytes(),
               [&](std::int64_t head, const Executor& executor, char* memory, char* workers) {
                 run_heads(head, executor, Shared(*this, memory), workers);
               });
  }

 private:
  enum Kind { kSumKeys, kAddUpKeys, kQueries, kAddUpQueries, kSumQueries, kKeys };
  static constexpr std::int64_t kPhasesBefore = 2, kPhasesOfQueries = 3;

  std::int64_t phases_of_head() const { return kPhasesBefore + x_.group * kPhasesOfQueries + 1; }
  Kind kind_of(std::int64_t phase) const {
    if (phase < kPhasesBefore) return Kind(phase);
    return phase + 1 == phases_of_head() ? kKeys : Kind(kQueries + (phase - kPhasesBefore) % kPhasesOfQueries);
  }

  // 1/n of a query and the last column of its G.
  struct Row {
    Sum inverse, last;
  };

  struct Shared {
    Sum *by_key,
        *by_query;  // H^T of the blocks of keys, [value_lanes][head_lanes]; phi(Q)^T G, [head_dim][value_lanes]
    Sum* grad;      // D of each block of keys
    Row* rows;      // of the queries of a group of heads
    Phases phases;
    std::int64_t bytes;

    Shared(const LinearBackward& f, char* memory) : Shared(f, Arena(memory)) {}

   private:
    Shared(const LinearBackward& f, Arena arena) : phases(arena, f.heads_.together() * f.phases_of_head(), 1) {
      const BlockSums<Sum> keys(nullptr, f.key_blocks_, f.elements());
      by_key = arena.take<Sum>(keys.total());
      by_query = arena.take<Sum>(BlockSums<Sum>(nullptr, f.query_blocks_, f.elements()).total());
      grad = arena.take<Sum>(f.key_blocks_ * keys.size());
      rows = arena.take<Row>(f.p_.length_q * f.x_.group);
      bytes = arena.used();
    }
  };

  struct Buffers {
    Sum *query, *grad_query, *grad;              // phi(Q), its gradient, G
    Sum *key, *grad_key, *value, *grad_value;    // phi(K), [V, 1] and their gradients
    Sum *key_by_feature, *value_by_feature;      // transposed
    Sum *products, *grad_products, *transposed;  // phi(Q) phi(K)^T and its gradient; D^T
    Sum* sums;
    std::int32_t* rows;
    std::int64_t bytes;

    Buffers(const LinearBackward& f, char* memory) {
      const Operands& x = f.x_;
      const std::int64_t queries = f.p_.block_q, keys = f.p_.block_k;
      Arena arena(memory);
      const auto take = [&](std::int64_t rows, std::int64_t lanes) {
        return arena.take<Sum>(Operands::rows_size(rows, lanes));
      };
      query = take(queries, x.head_lanes);
      grad_query = take(queries, x.head_lanes);
      grad = take(queries, x.value_lanes);
      key = take(keys, x.head_lanes);
      grad_key = take(keys, x.head_lanes);
      value = take(keys, x.value_lanes);
      grad_value = take(keys, x.value_lanes);
      key_by_feature = take(x.head_lanes, x.key_lanes);
      value_by_feature = take(x.value_lanes, x.key_lanes);
      products = take(queries, x.key_lanes);
      grad_products = take(queries, x.key_lanes);
      transposed = take(x.value_lanes, x.head_lanes);
      sums = arena.take<Sum>(kRowBlocks * BlockSums<Sum>(nullptr, 0, f.elements()).size());
      rows = arena.take<std::int32_t>(kRowBlocks * (larger(f.query_blocks_, f.key_blocks_) + 1));
      bytes = arena.used();
    }
  };

  std::int64_t elements() const { return x_.head_lanes * x_.value_lanes; }
  std::int64_t shared_bytes() const { return Shared(*this, nullptr).bytes; }
  std::int64_t worker_bytes() const { return Buffers(*this, nullptr).bytes; }

  // Each head of keys has these phases one after the other: the h_j, their prefixes, three for each of its heads of
  // queries, and the gradients of its keys and values.
  void run_heads(std::int64_t first, const Executor& executor, const Shared& shared, char* workers) const {
    const std::int64_t of_head = phases_of_head();
    const auto batches = [](std::int64_t blocks) { return (blocks + kRowBlocks - 1) / kRowBlocks; };
    const auto units = [&](std::int64_t phase) {
      const Sequence s(p_, (first + phase / of_head) / p_.heads_k);
      switch (kind_of(phase % of_head)) {
        case kSumKeys:
        case kKeys: return x_.key_blocks(s);
        case kQueries: return batches(x_.query_blocks(s));
        case kSumQueries: return batches(x_.key_blocks(s));
        default: return BlockSums<Sum>(nullptr, 0, elements()).slices();
      }
    };
    shared.phases.run(executor, units, [&](std::int64_t phase, std::int64_t unit, int worker) {
      const Sequence s(p_, (first + phase / of_head) / p_.heads_k);
      const std::int64_t key_head = (first + phase / of_head) % p_.heads_k,
                         head = key_head * x_.group + (phase % of_head - kPhasesBefore) / kPhasesOfQueries;
      const BlockSums<Sum> by_key(shared.by_key, x_.key_blocks(s), elements());
      const BlockSums<Sum> by_query(shared.by_query, x_.query_blocks(s), elements());
      const Buffers b(*this, workers + worker * worker_bytes());
      Sum* const grad = shared.grad + unit * by_key.size();
      switch (kind_of(phase % of_head)) {
        case kSumKeys:
          __builtin_memset(grad, 0, std::size_t(by_key.size()) * sizeof(Sum));
          return sum_keys(s, key_head, unit, by_key, b);
        case kAddUpKeys: return by_key.add_up(unit);
        case kQueries: return differentiate_queries(s, head, unit * kRowBlocks, by_key, by_query, shared, b);
        case kAddUpQueries: return by_query.add_up(unit);
        case kSumQueries: return sum_queries(s, head, unit * kRowBlocks, by_query, shared.grad, b);
        case kKeys: return differentiate_keys(s, key_head, unit, grad, shared, b);
      }
    });
  }

  // h_j^T
  void sum_keys(const Sequence& s, std::int64_t key_head, std::int64_t block, const BlockSums<Sum>& by_key,
                const Buffers& b) const {
    const Range keys = x_.keys(s, block);
    x_.load_keys(s, key_head, keys, b.key);
    x_.load_values(s, key_head, keys, b.value);
    x_.multiply_transposed(b.value, x_.value_lanes, b.key, x_.head_lanes, by_key.block(block), p_.value_dim + 1,
                           keys.count, false);
  }

  void differentiate_queries(const Sequence& s, std::int64_t head, std::int64_t first, const BlockSums<Sum>& by_key,
                             const BlockSums<Sum>& by_query, const Shared& shared, const Buffers& b) const {
    const std::int64_t blocks = x_.query_blocks(s), count = smaller(kRowBlocks, blocks - first);
    Terms terms[kRowBlocks];
    for (std::int64_t i = 0; i < count; ++i) {
      terms[i].rows = b.rows + i * (key_blocks_ + 1);
      const std::int8_t* const labels = x_.labels(s, head, first + i);
      by_key.choose(x_.seen_by_all(s, first + i), [&](std::int64_t key) { return x_.in_scope(labels[key]); }, terms[i]);
    }
    by_key.sum(terms, count, b.sums, false);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t block = first + i;
      differentiate_rows(s, head, block, b.sums + i * by_key.size(), shared, b);
      x_.multiply_transposed(b.query, x_.head_lanes, b.grad, x_.value_lanes, by_query.block(blocks - 1 - block),
                             p_.head_dim, x_.queries(s, block).count, false);
    }
  }

  // One block of queries, from H^T: dphi(Q), the gradient of Q, and phi(Q) and G in their buffers.
  void differentiate_rows(const Sequence& s, std::int64_t head, std::int64_t block, const Sum* sum,
                          const Shared& shared, const Buffers& b) const {
    const Range rows = x_.queries(s, block);
    Row* const stats = row_stats(shared, head, rows);
    x_.load_queries(s, head, rows, b.query);
    const Sum* const z = sum + p_.value_dim * x_.head_lanes;
    for (std::int64_t i = 0; i < rows.count; ++i) {
      Sum n = 0;
      for (std::int64_t d = 0; d < p_.head_dim; ++d) n += b.query[i * x_.head_lanes + d] * z[d];
      stats[i].inverse = n;
    }
    for_each_pair(s, head, block, [&](std::int64_t, Range keys) {
      load_pair(s, head, keys, b);
      multiply_pair(s, rows, keys, b);
      for (std::int64_t i = 0; i < rows.count; ++i)
        for (std::int64_t j = 0; j < keys.count; ++j) stats[i].inverse += b.products[i * x_.key_lanes + j];
    });
    for (std::int64_t i = 0; i < rows.count; ++i) {
      const std::int64_t row = s.first_q + rows.first + i;
      const Input* const grad = row_of<const Input>(p_.grad_output, s.batch, head, row);
      const Input* const output = row_of<const Input>(p_.output, s.batch, head, row);
      Sum dot = 0;
      for (std::int64_t d = 0; d < p_.value_dim; ++d) dot += Sum(to_float(grad[d])) * Sum(to_float(output[d]));
      stats[i].inverse = stats[i].inverse == 0 ? 0 : 1 / stats[i].inverse;
      stats[i].last = -dot * stats[i].inverse;
    }
    load_grad(s, head, rows, stats, b.grad);
    x_.multiply(b.grad, x_.value_lanes, sum, x_.head_lanes, b.grad_query, rows.count, p_.value_dim + 1, false);
    for_each_pair(s, head, block, [&](std::int64_t, Range keys) {
      load_pair(s, head, keys, b);
      differentiate_pair(s, rows, keys, b);
      x_.multiply(b.grad_products, x_.key_lanes, b.key, x_.head_lanes, b.grad_query, rows.count, keys.count, true);
    });
    store(p_.grad_query, s, head, s.first_q, rows, b.query, b.grad_query);
  }

  // Adds to D of some blocks of keys what one head of queries holds for them.
  void sum_queries(const Sequence& s, std::int64_t head, std::int64_t first, const BlockSums<Sum>& by_query, Sum* grad,
                   const Buffers& b) const {
    const std::int64_t blocks = x_.query_blocks(s), count = smaller(kRowBlocks, x_.key_blocks(s) - first);
    Terms terms[kRowBlocks];
    for (std::int64_t j = 0; j < count; ++j) {
      std::int64_t seen = 0;  // by all queries of so many blocks, the last ones
      while (seen < blocks && x_.seen_by_all(s, blocks - 1 - seen) > first + j) ++seen;
      terms[j].rows = b.rows + j * (query_blocks_ + 1);
      const std::int8_t* const labels = x_.labels(s, head, blocks - 1) + first + j;
      by_query.choose(seen, [&](std::int64_t i) { return x_.in_scope(labels[-i * p_.labels_row_stride]); }, terms[j]);
    }
    by_query.sum(terms, count, grad + first * by_query.size(), true);
  }

  void differentiate_keys(const Sequence& s, std::int64_t key_head, std::int64_t block, const Sum* grad,
                          const Shared& shared, const Buffers& b) const {
    const Range keys = x_.keys(s, block);
    load_pair(s, key_head * x_.group, keys, b);
    x_.transpose(grad, x_.value_lanes, p_.head_dim, p_.value_dim + 1, b.transposed, x_.head_lanes);
    x_.multiply(b.value, x_.value_lanes, b.transposed, x_.head_lanes, b.grad_key, keys.count, p_.value_dim + 1, false);
    x_.multiply(b.key, x_.head_lanes, grad, x_.value_lanes, b.grad_value, keys.count, p_.head_dim, false);
    for (std::int64_t i = 0; i < x_.query_blocks(s); ++i) {
      if (block < x_.seen_by_all(s, i)) break;
      if (block >= x_.seen_by_some(s, i)) continue;
      const Range rows = x_.queries(s, i);
      for (std::int64_t head = key_head * x_.group; head < (key_head + 1) * x_.group; ++head) {
        if (!x_.in_scope(x_.labels(s, head, i)[block])) continue;
        x_.load_queries(s, head, rows, b.query);
        load_grad(s, head, rows, row_stats(shared, head, rows), b.grad);
        multiply_pair(s, rows, keys, b);
        differentiate_pair(s, rows, keys, b);
        x_.multiply_transposed(b.grad_products, x_.key_lanes, b.query, x_.head_lanes, b.grad_key, keys.count,
                               rows.count, true);
        x_.multiply_transposed(b.products, x_.key_lanes, b.grad, x_.value_lanes, b.grad_value, keys.count, rows.count,
                               true);
      }
    }
    store(p_.grad_key, s, key_head, s.first_k, keys, b.key, b.grad_key);
    for (std::int64_t j = 0; j < keys.count; ++j)
      convert_row(row_of<Sum>(p_.grad_value, s.batch, key_head, s.first_k + keys.first + j),
                  b.grad_value + j * x_.value_lanes, p_.value_dim);
  }

  // Calls visit(block, its keys) for the blocks in scope that some queries of a block see and others do not.
  template <class Visit>
  void for_each_pair(const Sequence& s, std::int64_t head, std::int64_t block, Visit visit) const {
    for (std::int64_t j = x_.seen_by_all(s, block); j < x_.seen_by_some(s, block); ++j)
      if (x_.in_scope(x_.labels(s, head, block)[j])) visit(j, x_.keys(s, j));
  }
  void load_pair(const Sequence& s, std::int64_t head, Range keys, const Buffers& b) const {
    x_.load_keys(s, head / x_.group, keys, b.key);
    x_.load_values(s, head / x_.group, keys, b.value);
    x_.transpose(b.key, x_.head_lanes, keys.count, p_.head_dim, b.key_by_feature, x_.key_lanes);
    x_.transpose(b.value, x_.value_lanes, keys.count, p_.value_dim + 1, b.value_by_feature, x_.key_lanes);
  }
  void multiply_pair(const Sequence& s, Range rows, Range keys, const Buffers& b) const {
    x_.multiply(b.query, x_.head_lanes, b.key_by_feature, x_.key_lanes, b.products, rows.count, p_.head_dim, false);
    x_.hide(s, rows, keys, b.products);
  }
  void differentiate_pair(const Sequence& s, Range rows, Range keys, const Buffers& b) const {
    x_.multiply(b.grad, x_.value_lanes, b.value_by_feature, x_.key_lanes, b.grad_products, rows.count, p_.value_dim + 1,
                false);
    x_.hide(s, rows, keys, b.grad_products);
  }

  Row* row_stats(const Shared& shared, std::int64_t head, Range rows) const {
    return shared.rows + head % x_.group * p_.length_q + rows.first;
  }
  void load_grad(const Sequence& s, std::int64_t head, Range rows, const Row* stats, Sum* to) const {
    for (std::int64_t i = 0; i < rows.count; ++i, to += x_.value_lanes) {
      convert_row(to, row_of<const Input>(p_.grad_output, s.batch, head, s.first_q + rows.first + i), p_.value_dim);
      for (std::int64_t d = 0; d < p_.value_dim; ++d) to[d] *= stats[i].inverse;
      to[p_.value_dim] = stats[i].last;
      for (std::int64_t d = p_.value_dim + 1; d < x_.value_lanes; ++d) to[d] = 0;
    }
  }
  void store(const Tensor& to, const Sequence& s, std::int64_t head, std::int64_t first, Range rows, const Sum* phi,
             Sum* grad) const {
    for (std::int64_t i = 0; i < rows.count; ++i, phi += x_.head_lanes, grad += x_.head_lanes) {
      differentiate_features(p_.feature_map, phi, grad, p_.head_dim);
      convert_row(row_of<Sum>(to, s.batch, head, first + rows.first + i), grad, p_.head_dim);
    }
  }

  const LinearBackwardParams& p_;
  Operands x_;
  std::int64_t query_blocks_, key_blocks_;  // of the longest sequence
  HeadsInPhases heads_;
};

}  // namespace attnx::cpu::ATTNX_ISA
