// This is the forward of linear attention with a state. A unit of work is a head of keys, with the state and all heads
// of queries that read it; or less, as slices.h has it.
#pragma once

#include "slices.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class LinearStateForward {
  using Chunk = LinearStateChunk<Input>;
  using Sum = typename Chunk::Sum;

 public:
  LinearStateForward(const LinearStateForwardParams& p, const Executor& executor)
      : p_(p), executor_(executor), slices_(p, executor.threads) {}

  std::int64_t workspace_bytes() const {
    return are_sliced() ? InTwoPhases(*this, nullptr).bytes : executor_.threads * Buffers(*this, nullptr).bytes;
  }

  void run(char* workspace) const {
    const std::int64_t bytes = Buffers(*this, nullptr).bytes, chunks = chunks_of(p_.length_q, Chunk::kTokens);
    if (is_short())
      return for_each_unit(executor_, slices_.heads * chunks, workspace, bytes, [&](std::int64_t unit, char* memory) {
        const std::int64_t head = unit / chunks;
        weigh_all(head / p_.heads_k, head % p_.heads_k, unit % chunks * Chunk::kTokens, Buffers(*this, memory));
      });
    if (are_sliced()) return run_in_two_phases(workspace);
    for_each_unit(executor_, slices_.heads, workspace, bytes, [&](std::int64_t unit, char* memory) {
      visit(unit / p_.heads_k, unit % p_.heads_k, Buffers(*this, memory));
    });
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

  struct InTwoPhases {
    Phases phases;
    Sum* states;  // of each head before each chunk of keys, where attention is causal, and behind all keys
    char* of_workers;
    std::int64_t states_of_head, worker_bytes, bytes;

    InTwoPhases(const LinearStateForward& f, char* memory) : InTwoPhases(f, memory, Arena(memory)) {}

   private:
    InTwoPhases(const LinearStateForward& f, char* memory, Arena arena) : phases(arena, 2, 1) {
      const Buffers one(f, nullptr);
      states_of_head = (f.p_.is_causal ? chunks_of(f.p_.length_k, Chunk::kTokens) : 0) + 1;
      states = arena.take<Sum>(f.slices_.heads * states_of_head * one.chunk.state_size());
      worker_bytes = one.bytes;
      of_workers = memory + arena.used();
      bytes = arena.used() + f.executor_.threads * worker_bytes;
    }
  };

  bool are_sliced() const { return !is_short() && slices_.are_wanted(p_, executor_.threads); }

  // It tells whether the weights of all pairs cost less than states, where nobody wants a state.
  bool is_short() const {
    const std::int64_t columns = p_.value_dim + 1, of_pair = p_.head_dim + columns;
    const std::int64_t pairs_of_query = p_.is_causal ? (p_.length_k + Chunk::kTokens) / 2 : p_.length_k;
    const std::int64_t own_pairs = p_.is_causal ? smaller(p_.length_k, Chunk::kTokens) : 0;
    return !p_.state && !p_.initial_state.data && (pairs_of_query - own_pairs) * of_pair < 2 * p_.features() * columns;
  }

  void visit(std::int64_t batch, std::int64_t head, const Buffers& b) const {
    const Chunk& c = b.chunk;
    c.load_state(p_.initial_state, batch, head, c.all_rows(), b.state);
    for (std::int64_t first = 0; first < p_.length_k; first += Chunk::kTokens) {
      c.load_keys(batch, head, first);
      if (p_.is_causal) attend(batch, head, first, b.state, c);
      c.add_keys(c.tokens(first, p_.length_k), c.all_rows(), b.state);
    }
    for (std::int64_t first = 0; !p_.is_causal && first < p_.length_q; first += Chunk::kTokens)
      attend(batch, head, first, b.state, c);
    if (p_.state) c.store_state(b.state, p_.state, batch, head, c.all_rows());
  }

  void run_in_two_phases(char* workspace) const {
    const InTwoPhases shared(*this, workspace);
    const std::int64_t chunks = chunks_of(p_.length_q, Chunk::kTokens);
    shared.phases.run(
        executor_, [&](std::int64_t phase) { return phase == 0 ? slices_.units() : slices_.heads * chunks; },
        [&](std::int64_t phase, std::int64_t unit, int worker) {
          const Buffers b(*this, shared.of_workers + worker * shared.worker_bytes);
          const std::int64_t head = phase == 0 ? slices_.head(unit) : unit / chunks;
          const std::int64_t batch = head / p_.heads_k, key_head = head % p_.heads_k;
          Sum* const states = shared.states + head * shared.states_of_head * b.chunk.state_size();
          if (phase == 0) return sum_up(batch, key_head, slices_.rows_of(unit), states, b.chunk);
          const std::int64_t first = unit % chunks * Chunk::kTokens;
          if (p_.is_causal) b.chunk.load_keys(batch, key_head, first);
          const std::int64_t state = p_.is_causal ? unit % chunks : 0;
          attend(batch, key_head, first, states + state * b.chunk.state_size(), b.chunk);
        });
  }

  // This makes some rows of the states before all chunks of keys and behind them, or of the last alone.
  void sum_up(std::int64_t batch, std::int64_t head, FeatureRows rows, Sum* states, const Chunk& c) const {
    c.load_state(p_.initial_state, batch, head, rows, states);
    for (std::int64_t first = 0; first < p_.length_k; first += Chunk::kTokens) {
      if (p_.is_causal) {
        c.copy_state(states, rows, states + c.state_size());
        states += c.state_size();
      }
      c.load_keys(batch, head, first);
      c.add_keys(c.tokens(first, p_.length_k), rows, states);
    }
    if (p_.state) c.store_state(states, p_.state, batch, head, rows);
  }

  void weigh_all(std::int64_t batch, std::int64_t key_head, std::int64_t first, const Buffers& b) const {
    const Chunk& c = b.chunk;
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

  void attend(std::int64_t batch, std::int64_t key_head, std::int64_t first, const Sum* state, const Chunk& c) const {
    const std::int64_t count = c.tokens(first, p_.length_q);
    for (std::int64_t head = key_head * c.group; head < (key_head + 1) * c.group; ++head) {
      c.load_queries(batch, head, first);
      if (p_.is_causal) c.weigh_pairs(count, count, true);
      c.attend(count, state, p_.is_causal);
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
  LinearStateSlices slices_;
};

}  // namespace attnx::cpu::ATTNX_ISA
