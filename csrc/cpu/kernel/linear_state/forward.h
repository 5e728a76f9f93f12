// Linear attention with a state, forward. A unit of work is a head of keys, with the state and all heads of queries
// that read it.
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

  void visit(std::int64_t batch, std::int64_t head, const Buffers& b) const {
    const Chunk& c = b.chunk;
    c.load_state(p_.initial_state, batch, head, b.state);
    for (std::int64_t first = 0; first < p_.length_k; first += Chunk::kTokens) {
      c.load_keys(batch, head, first);
      if (p_.is_causal) attend(batch, head, first, b);
      c.add_keys(c.tokens(first, p_.length_k), b.state);
    }
    for (std::int64_t first = 0; !p_.is_causal && first < p_.length_q; first += Chunk::kTokens)
      attend(batch, head, first, b);
    c.store_state(b.state, p_.state, batch, head);
  }

  void attend(std::int64_t batch, std::int64_t key_head, std::int64_t first, const Buffers& b) const {
    const Chunk& c = b.chunk;
    const std::int64_t count = c.tokens(first, p_.length_q);
    for (std::int64_t head = key_head * c.group; head < (key_head + 1) * c.group; ++head) {
      c.load_queries(batch, head, first);
      if (p_.is_causal) c.weigh_pairs(count);
      c.attend(count, b.state, p_.is_causal);
      for (std::int64_t i = 0; i < count; ++i) {
        Sum* const row = c.outputs + i * c.value_lanes;
        const Sum n = row[p_.value_dim], factor = n == 0 ? 0 : 1 / n;
        for (std::int64_t d = 0; d < p_.value_dim; ++d) row[d] *= factor;
        convert_row(row_of<Input>(p_.output, batch, head, first + i), row, p_.value_dim);
      }
    }
  }

  const LinearStateForwardParams& p_;
  const Executor& executor_;
};

}  // namespace attnx::cpu::ATTNX_ISA
