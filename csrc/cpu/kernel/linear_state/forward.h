// This is the forward of linear attention with a state. A unit of work is a head of keys, with the state and all heads
// of queries that read it.
#pragma once

#include "../units.h"
#include "chunk.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class LinearStateForward {
  using Chunk = LinearStateChunk<Input>;
  using Sum = typename Chunk::Sum;

 public:
  LinearStateForward(const LinearStateForwardParams& p, const Executor& executor) : p_(p), executor_(executor) {}

  std::int64_t workspace_bytes() const { return executor_.threads * Buffers(*this, nullptr).bytes; }

  void run(char* workspace) const {
    for_each_unit(
        executor_, p_.batch * p_.heads_k, workspace, Buffers(*this, nullptr).bytes,
        [&](std::int64_t unit, char* memory) { visit(unit / p_.heads_k, unit % p_.heads_k, Buffers(*this, memory)); });
  }

 private:
  struct Buffers {
    Chunk chunk;
    Sum* state;
    std::int64_t bytes;

    Buffers(const LinearStateForward& f, char* memory) : Buffers(f, Arena(memory)) {}

   private:
    Buffers(const LinearStateForward& f, Arena arena)
        : chunk(f.p_, arena), state(arena.take<Sum>(chunk.state_size())), bytes(arena.used()) {}
  };

  // It tells whether the weights of all pairs cost less than states, where nobody wants a state.
  bool is_short() const {
    const std::int64_t columns = p_.value_dim + 1, of_pair = p_.head_dim + columns;
    const std::int64_t pairs_of_query = p_.is_causal ? (p_.length_k + Chunk::kTokens) / 2 : p_.length_k;
    const std::int64_t own_pairs = p_.is_causal ? smaller(p_.length_k, Chunk::kTokens) : 0;
    return !p_.state && !p_.initial_state.data && (pairs_of_query - own_pairs) * of_pair < 2 * p_.features() * columns;
  }

  void visit(std::int64_t batch, std::int64_t head, const Buffers& b) const {
    const Chunk& c = b.chunk;
    if (is_short()) return weigh_all(batch, head, b);
    c.load_state(p_.initial_state, batch, head, b.state);
    for (std::int64_t first = 0; first < p_.length_k; first += Chunk::kTokens) {
      c.load_keys(batch, head, first);
      if (p_.is_causal) attend(batch, head, first, b);
      c.add_keys(c.tokens(first, p_.length_k), b.state);
    }
    for (std::int64_t first = 0; !p_.is_causal && first < p_.length_q; first += Chunk::kTokens)
      attend(batch, head, first, b);
    if (p_.state) c.store_state(b.state, p_.state, batch, head);
  }

  void weigh_all(std::int64_t batch, std::int64_t key_head, const Buffers& b) const {
    const Chunk& c = b.chunk;
    for (std::int64_t first = 0; first < p_.length_q; first += Chunk::kTokens) {
      const std::int64_t count = c.tokens(first, p_.length_q);
      const std::int64_t end = p_.is_causal ? first + count : p_.length_k;
      for (std::int64_t head = key_head * c.group; head < (key_head + 1) * c.group; ++head) {
        c.load_queries(batch, head, first, false);
        set_zero(c.outputs, count * c.value_lanes);
        for (std::int64_t key = 0; key < end; key += Chunk::kTokens) {
          const std::int64_t count_of_keys = c.tokens(key, p_.length_k);
          c.load_keys(batch, key_head, key, false);
          c.weigh_pairs(count, count_of_keys, p_.is_causal && key == first);
          Chunk::multiply(c.weights, Chunk::kTokens, c.values, c.value_lanes, c.outputs, count, count_of_keys, true);
        }
        store_outputs(batch, head, first, count, c);
      }
    }
  }

  void attend(std::int64_t batch, std::int64_t key_head, std::int64_t first, const Buffers& b) const {
    const Chunk& c = b.chunk;
    const std::int64_t count = c.tokens(first, p_.length_q);
    for (std::int64_t head = key_head * c.group; head < (key_head + 1) * c.group; ++head) {
      c.load_queries(batch, head, first);
      if (p_.is_causal) c.weigh_pairs(count, count, true);
      c.attend(count, b.state, p_.is_causal);
      store_outputs(batch, head, first, count, c);
    }
  }

  void store_outputs(std::int64_t batch, std::int64_t head, std::int64_t first, std::int64_t count,
                     const Chunk& c) const {
    for (std::int64_t i = 0; i < count; ++i) {
      Sum* const row = c.outputs + i * c.value_lanes;
      const Sum n = row[p_.value_dim], factor = n == 0 ? 0 : 1 / n;
      for (std::int64_t d = 0; d < p_.value_dim; ++d) row[d] *= factor;
      convert_row(row_of<Input>(p_.output, batch, head, first + i), row, p_.value_dim);
    }
  }

  const LinearStateForwardParams& p_;
  const Executor& executor_;
};

}  // namespace attnx::cpu::ATTNX_ISA
