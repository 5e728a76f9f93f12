// This makes the products of means of blocks, in one parallel region. A head of keys needs the means of its blocks, as
// the lanes of an operand, then those of blocks of queries, a few at a time, and their products, which are gone through
// while they are in the cache.
#pragma once

#include "../block_products.h"
#include "arena.h"
#include "gemm.h"
#include "phases.h"
#include "rows.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class BlockProducts {
  using Sum = typename Arithmetic<Input>::Sum;
  using A = FusedMultiplyAdd<Sum>;
  static constexpr std::int64_t kKeyBlocks = 8, kQueryBlocks = 16;  // of a unit
  static constexpr std::int64_t kFeatures = 8;                      // likewise

 public:
  BlockProducts(const BlockProductsParams& p, const Executor& executor)
      : p_(p),
        head_lanes_(round_up(p.head_dim, kLanes<Sum>)),
        key_lanes_(round_up(blocks_of(p.length_k, p.block_k), kLanes<Sum>)),
        heads_(p.batch * p.heads_k, executor, means_of_head() * std::int64_t(sizeof(Sum))) {}

  std::int64_t workspace_bytes() const { return heads_.workspace_bytes(shared_bytes(), worker_bytes()); }

  void run(char* workspace) const {
    heads_.run(workspace, shared_bytes(), worker_bytes(),
               [&](std::int64_t head, const Executor& executor, char* memory, char* workers) {
                 run_heads(head, executor, Shared(*this, memory), workers);
               });
  }

 private:
  enum Phase { kPool, kSmooth, kMultiply, kPhases };

  struct Shared {
    Phases phases;
    Sum* means;  // of keys, [head][head_dim][key_lanes]
    std::int64_t bytes;

    Shared(const BlockProducts& f, char* memory) : Shared(f, Arena(memory)) {}

   private:
    Shared(const BlockProducts& f, Arena arena)
        : phases(arena, kPhases, 1), means(arena.take<Sum>(f.heads_.together() * f.means_of_head())) {
      bytes = arena.used();
    }
  };

  struct Buffers {
    Sum *rows, *mean, *queries, *products;
    char* scratch;
    std::int64_t bytes;

    Buffers(const BlockProducts& f, char* memory) {
      Arena arena(memory);
      rows = arena.take<Sum>(larger(f.p_.block_q, f.p_.block_k) * f.head_lanes_);
      mean = arena.take<Sum>(f.head_lanes_);
      queries = arena.take<Sum>(round_up(kQueryBlocks, kRowMultiple) * f.head_lanes_);
      products = arena.take<Sum>(kQueryBlocks * f.key_lanes_);
      scratch = arena.take<char>(f.p_.scratch_bytes);
      bytes = arena.used();
    }
  };

  static std::int64_t blocks_of(std::int64_t length, std::int64_t block) { return (length + block - 1) / block; }
  // Of the blocks of the longest sequence.
  static std::int64_t chunks(std::int64_t length, std::int64_t block, std::int64_t of_unit) {
    return (blocks_of(length, block) + of_unit - 1) / of_unit;
  }
  std::int64_t shared_bytes() const { return Shared(*this, nullptr).bytes; }
  std::int64_t worker_bytes() const { return Buffers(*this, nullptr).bytes; }
  std::int64_t means_of_head() const { return p_.head_dim * key_lanes_; }

  void run_heads(std::int64_t first, const Executor& executor, const Shared& shared, char* workers) const {
    const std::int64_t heads = heads_.together(), group = p_.heads_q / p_.heads_k;
    const std::int64_t key_chunks = chunks(p_.length_k, p_.block_k, kKeyBlocks);
    const std::int64_t query_chunks = chunks(p_.length_q, p_.block_q, kQueryBlocks);
    const std::int64_t feature_chunks = (p_.head_dim + kFeatures - 1) / kFeatures;
    const auto units = [&](std::int64_t phase) {
      if (phase == kPool) return heads * key_chunks;
      if (phase == kSmooth) return p_.smooth_k ? heads * feature_chunks : 0;
      return heads * group * query_chunks;
    };
    shared.phases.run(executor, units, [&](std::int64_t phase, std::int64_t unit, int worker) {
      const Buffers b(*this, workers + worker * worker_bytes());
      const std::int64_t chunks = phase == kPool     ? key_chunks
                                  : phase == kSmooth ? feature_chunks
                                                     : group * query_chunks;
      const std::int64_t head = first + unit / chunks, chunk = unit % chunks;
      Sum* const means = shared.means + unit / chunks * means_of_head();
      if (phase == kPool) return pool_keys(head, chunk * kKeyBlocks, means, b);
      if (phase == kSmooth) return smooth(head, chunk * kFeatures, means);
      multiply(head, chunk / query_chunks, chunk % query_chunks * kQueryBlocks, means, b);
    });
  }

  // The mean of rows first .. first + count - 1 of a head. Of a whole block, a power of two of rows, one half is added
  // to the other until one row is left; of a ragged one float64 does not round the sum. So the mean of equal tokens is
  // that token, however many they are.
  void pool(const Tensor& from, std::int64_t batch, std::int64_t head, std::int64_t first, std::int64_t count,
            std::int64_t block, Sum* rows, Sum* to) const {
    for (std::int64_t i = 0; i < count; ++i)
      convert_row(rows + i * head_lanes_, row_of<const Input>(from, batch, head, first + i), p_.head_dim);
    if (count < block) {
      for (std::int64_t d = 0; d < p_.head_dim; ++d) {
        double sum = 0;
        for (std::int64_t i = 0; i < count; ++i) sum += double(rows[i * head_lanes_ + d]);
        to[d] = Sum(sum / double(count));
      }
      return;
    }
    for (std::int64_t half = count / 2; half > 0; half /= 2) {
      const Sum* const other = rows + half * head_lanes_;
      for (std::int64_t i = 0; i < half * head_lanes_; ++i) rows[i] += other[i];
    }
    for (std::int64_t d = 0; d < p_.head_dim; ++d) to[d] = rows[d] / Sum(count);
  }

  void pool_keys(std::int64_t head, std::int64_t first, Sum* means, const Buffers& b) const {
    const Sequence s(p_, head / p_.heads_k);
    const std::int64_t end = smaller(first + kKeyBlocks, blocks_of(s.length_k, p_.block_k));
    for (std::int64_t j = first; j < end; ++j) {
      const std::int64_t key = j * p_.block_k;
      pool(p_.key, s.batch, head % p_.heads_k, s.first_k + key, smaller(p_.block_k, s.length_k - key), p_.block_k,
           b.rows, b.mean);
      Sum* const to = means + j;
      for (std::int64_t d = 0; d < p_.head_dim; ++d) to[d * key_lanes_] = b.mean[d];
    }
  }

  // Subtracts some features of the mean key, which comes from the means of blocks, in float64.
  void smooth(std::int64_t head, std::int64_t first, Sum* all_means) const {
    const Sequence s(p_, head / p_.heads_k);
    const std::int64_t blocks = blocks_of(s.length_k, p_.block_k);
    for (std::int64_t d = first; d < smaller(first + kFeatures, p_.head_dim); ++d) {
      Sum* const means = all_means + d * key_lanes_;
      double sum = 0;
      for (std::int64_t j = 0; j < blocks; ++j)
        sum += double(means[j]) * double(smaller(p_.block_k, s.length_k - j * p_.block_k));
      const auto mean = Sum(sum / double(s.length_k));
      for (std::int64_t j = 0; j < blocks; ++j) means[j] -= mean;
    }
  }

  // It multiplies blocks of queries of the n-th head of a group.
  void multiply(std::int64_t key_head, std::int64_t n, std::int64_t first, const Sum* means, const Buffers& b) const {
    const Sequence s(p_, key_head / p_.heads_k);
    const std::int64_t count = smaller(kQueryBlocks, blocks_of(s.length_q, p_.block_q) - first);
    const std::int64_t of_sequence = key_head % p_.heads_k * (p_.heads_q / p_.heads_k) + n;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t query = (first + i) * p_.block_q;
      pool(p_.query, s.batch, of_sequence, s.first_q + query, smaller(p_.block_q, s.length_q - query), p_.block_q,
           b.rows, b.queries + i * head_lanes_);
    }
    const std::int64_t vectors = round_up(blocks_of(s.length_k, p_.block_k), kLanes<Sum>) / kLanes<Sum>;
    gemm<A>({b.queries, head_lanes_, 1, means, key_lanes_, b.products, key_lanes_}, count, vectors, p_.head_dim, false);
    const auto sign = Sum(int(p_.scale > 0) - int(p_.scale < 0));
    for (std::int64_t i = 0; i < count; ++i) {
      Sum* const row = b.products + i * key_lanes_;
      for (std::int64_t j = 0; j < vectors * kLanes<Sum>; ++j) row[j] *= sign;
      p_.receive(p_.receiver, {s.batch, of_sequence, first + i, s.length_q, s.length_k, row, b.scratch});
    }
  }

  const BlockProductsParams& p_;
  std::int64_t head_lanes_, key_lanes_;
  HeadsInPhases heads_;
};

}  // namespace attnx::cpu::ATTNX_ISA
