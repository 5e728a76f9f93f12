// This is the backward of linear attention with a state. With y = N / n of a row, G = [dO / n, -(dO . y) / n] is the
// gradient of [N, n]. On the way forward through the chunks the states give dphi(Q) = G S^T; on the way back T, the sum
// of phi(q) G^T of later queries on the gradient of the last state, gives dphi(K) = [V, 1] T^T and dV = phi(K) T. A
// unit of work is a head of keys; or less, as slices.h has it, where S, what reads it, T, and what reads it are four
// phases.
#pragma once

#include "slices.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class LinearStateBackward {
  using Chunk = LinearStateChunk<Input>;
  using Sum = typename Chunk::Sum;

 public:
  LinearStateBackward(const LinearStateBackwardParams& p, const Executor& executor)
      : p_(p), executor_(executor), slices_(p, executor.threads) {}

  std::int64_t workspace_bytes() const {
    if (slices_.are_wanted(p_, executor_.threads)) return InFourPhases(*this, nullptr).bytes;
    return executor_.threads * OneHead(*this, nullptr).bytes;
  }

  void run(char* workspace) const {
    if (slices_.are_wanted(p_, executor_.threads)) return run_in_four_phases(workspace);
    for_each_unit(
        executor_, slices_.heads, workspace, OneHead(*this, nullptr).bytes,
        [&](std::int64_t unit, char* memory) { visit(unit / p_.heads_k, unit % p_.heads_k, OneHead(*this, memory)); });
  }

 private:
  // What a worker needs for a chunk.
  struct Buffers {
    Chunk chunk;
    Sum* transposed;    // of a state, [value_dim + 1][feature_lanes]
    Sum* grad_queries;  // [kTokens][row_lanes]
    Sum* grad_features;
    Sum* grad_weights;  // of pairs, times their slopes

    Buffers(const LinearStateBackward& f, Arena& arena) : chunk(f.p_, arena) {
      const auto take = [&](std::int64_t rows, std::int64_t lanes) {
        return arena.take<Sum>(Chunk::rows_size(rows, lanes));
      };
      transposed = arena.take<Sum>((f.p_.value_dim + 1) * chunk.feature_lanes);
      grad_queries = take(Chunk::kTokens, chunk.row_lanes);
      grad_features = take(Chunk::kTokens, chunk.feature_lanes);
      grad_weights = take(Chunk::kTokens, Chunk::kTokens);
    }
  };

  // What is kept of a head of keys.
  struct Kept {
    Sum* states;        // S, then T
    Sum* grad_outputs;  // G of all rows, [group][length_q][value_lanes]
    Sum* grad_values;   // what the pairs of chunks add, [length_k][value_lanes]
    Sum* grad_keys;     // likewise, [length_k][row_lanes]

    Kept(const LinearStateBackward& f, const Chunk& c, std::int64_t states_of_head, Arena& arena)
        : states(arena.take<Sum>(states_of_head * c.state_size())),
          grad_outputs(arena.take<Sum>(Chunk::rows_size(c.group * f.p_.length_q, c.value_lanes))),
          grad_values(arena.take<Sum>(Chunk::rows_size(f.p_.length_k, c.value_lanes))),
          grad_keys(arena.take<Sum>(Chunk::rows_size(f.p_.length_k, c.row_lanes))) {}
  };

  struct OneHead {
    Buffers buffers;
    Kept kept;
    std::int64_t bytes;

    OneHead(const LinearStateBackward& f, char* memory) : OneHead(f, Arena(memory)) {}

   private:
    OneHead(const LinearStateBackward& f, Arena arena)
        : buffers(f, arena), kept(f, buffers.chunk, 1, arena), bytes(arena.used()) {}
  };

  struct InFourPhases {
    Phases phases;
    std::int64_t states_of_head, head_bytes, worker_bytes, bytes;
    char *of_heads, *of_workers;

    InFourPhases(const LinearStateBackward& f, char* memory) : InFourPhases(f, memory, Arena(memory)) {}

   private:
    InFourPhases(const LinearStateBackward& f, char* memory, Arena arena) : phases(arena, 4, 1) {
      // One for each chunk, or for all, and one more behind the last.
      states_of_head = (f.p_.is_causal ? chunks_of(f.p_.length_k, Chunk::kTokens) : 0) + 1;
      Arena of_worker(nullptr), of_head(nullptr);
      const Buffers one(f, of_worker);
      Kept(f, one.chunk, states_of_head, of_head);
      worker_bytes = of_worker.used(), head_bytes = of_head.used();
      of_heads = memory + arena.used();
      of_workers = of_heads + f.slices_.heads * head_bytes;
      bytes = arena.used() + f.slices_.heads * head_bytes + f.executor_.threads * worker_bytes;
    }
  };

  Sum* grad_outputs(const Kept& kept, std::int64_t of_group, std::int64_t first, const Chunk& c) const {
    return kept.grad_outputs + (of_group * p_.length_q + first) * c.value_lanes;
  }

  void visit(std::int64_t batch, std::int64_t head, const OneHead& all) const {
    const Buffers& b = all.buffers;
    const Chunk& c = b.chunk;
    Sum* const state = all.kept.states;
    c.load_state(p_.initial_state, batch, head, c.all_rows(), state);
    for (std::int64_t first = 0; first < p_.length_k; first += Chunk::kTokens) {
      c.load_keys(batch, head, first);
      clear_keys(first, all.kept, c);
      if (p_.is_causal) go_forward(batch, head, first, state, all.kept, b);
      c.add_keys(c.tokens(first, p_.length_k), c.all_rows(), state);
    }
    for (std::int64_t first = 0; !p_.is_causal && first < p_.length_q; first += Chunk::kTokens)
      go_forward(batch, head, first, state, all.kept, b);

    c.load_state(p_.grad_state, batch, head, c.all_rows(), state);
    for (std::int64_t first = 0; !p_.is_causal && first < p_.length_q; first += Chunk::kTokens)
      add_queries(batch, head, first, c.all_rows(), state, all.kept, c);
    for (std::int64_t chunk = chunks_of(p_.length_k, Chunk::kTokens) - 1; chunk >= 0; --chunk) {
      go_back(batch, head, chunk * Chunk::kTokens, state, all.kept, b);
      if (p_.is_causal) add_queries(batch, head, chunk * Chunk::kTokens, c.all_rows(), state, all.kept, c);
    }
    c.store_state(state, p_.grad_initial_state, batch, head, c.all_rows());
  }

  void run_in_four_phases(char* workspace) const {
    enum { kSumForward, kQueries, kSumBack, kKeys };
    const InFourPhases shared(*this, workspace);
    const std::int64_t chunks_q = chunks_of(p_.length_q, Chunk::kTokens);
    const std::int64_t chunks_k = chunks_of(p_.length_k, Chunk::kTokens);
    const auto per_head = [&](std::int64_t phase) { return phase == kQueries ? chunks_q : chunks_k; };
    shared.phases.run(
        executor_,
        [&](std::int64_t phase) {
          return phase == kSumForward || phase == kSumBack ? slices_.units() : slices_.heads * per_head(phase);
        },
        [&](std::int64_t phase, std::int64_t unit, int worker) {
          Arena of_worker(shared.of_workers + worker * shared.worker_bytes);
          const Buffers b(*this, of_worker);
          const bool sums = phase == kSumForward || phase == kSumBack;
          const std::int64_t head = sums ? slices_.head(unit) : unit / per_head(phase);
          Arena of_head(shared.of_heads + head * shared.head_bytes);
          const Kept kept(*this, b.chunk, shared.states_of_head, of_head);
          const std::int64_t batch = head / p_.heads_k, key_head = head % p_.heads_k;
          if (phase == kSumForward) return sum_keys(batch, key_head, slices_.rows_of(unit), kept, b.chunk);
          if (phase == kSumBack) return sum_queries(batch, key_head, slices_.rows_of(unit), kept, b.chunk);
          const std::int64_t chunk = unit % per_head(phase), first = chunk * Chunk::kTokens;
          const Sum* const state = kept.states + (p_.is_causal ? chunk : 0) * b.chunk.state_size();
          if (phase == kQueries) {
            if (p_.is_causal) b.chunk.load_keys(batch, key_head, first), clear_keys(first, kept, b.chunk);
            go_forward(batch, key_head, first, state, kept, b);
          } else {
            if (!p_.is_causal) clear_keys(first, kept, b.chunk);
            go_back(batch, key_head, first, state, kept, b);
          }
        });
  }

  // This makes some rows of S before each chunk, or of that behind all keys.
  void sum_keys(std::int64_t batch, std::int64_t head, FeatureRows rows, const Kept& kept, const Chunk& c) const {
    Sum* state = kept.states;
    c.load_state(p_.initial_state, batch, head, rows, state);
    for (std::int64_t first = 0; first < p_.length_k; first += Chunk::kTokens) {
      if (p_.is_causal) c.copy_state(state, rows, state + c.state_size()), state += c.state_size();
      c.load_keys(batch, head, first);
      c.add_keys(c.tokens(first, p_.length_k), rows, state);
    }
  }

  // This makes some rows of T behind each chunk, or of that of all queries.
  void sum_queries(std::int64_t batch, std::int64_t head, FeatureRows rows, const Kept& kept, const Chunk& c) const {
    const std::int64_t chunks = chunks_of(p_.length_q, Chunk::kTokens), size = p_.is_causal ? c.state_size() : 0;
    Sum* const start = kept.states + (chunks - 1) * size;
    c.load_state(p_.grad_state, batch, head, rows, start);
    if (!p_.is_causal) {
      for (std::int64_t first = 0; first < p_.length_q; first += Chunk::kTokens)
        add_queries(batch, head, first, rows, start, kept, c);
      return c.store_state(start, p_.grad_initial_state, batch, head, rows);
    }
    // The place behind the last chunk, which nothing reads, is for the gradient of the first state.
    for (std::int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      Sum* const state = kept.states + chunk * size;
      Sum* const next = chunk > 0 ? state - size : kept.states + chunks * size;
      c.copy_state(state, rows, next);
      add_queries(batch, head, chunk * Chunk::kTokens, rows, next, kept, c);
    }
    c.store_state(kept.states + chunks * size, p_.grad_initial_state, batch, head, rows);
  }

  void clear_keys(std::int64_t first, const Kept& kept, const Chunk& c) const {
    const std::int64_t count = c.tokens(first, p_.length_k);
    set_zero(kept.grad_values + first * c.value_lanes, count * c.value_lanes);
    set_zero(kept.grad_keys + first * c.row_lanes, count * c.row_lanes);
  }

  // This makes the gradients of queries, and what pairs of the chunk add to those of keys and values.
  void go_forward(std::int64_t batch, std::int64_t key_head, std::int64_t first, const Sum* state, const Kept& kept,
                  const Buffers& b) const {
    const Chunk& c = b.chunk;
    const std::int64_t count = c.tokens(first, p_.length_q);
    c.transpose(state, c.value_lanes, c.features, p_.value_dim + 1, b.transposed, c.feature_lanes);
    for (std::int64_t g = 0; g < c.group; ++g) {
      const std::int64_t head = key_head * c.group + g;
      Sum* const grads = grad_outputs(kept, g, first, c);
      c.load_queries(batch, head, first);
      if (p_.is_causal) c.weigh_pairs(count, count, true);
      c.attend(count, state, p_.is_causal);
      for (std::int64_t i = 0; i < count; ++i) read_gradient(batch, head, first + i, i, grads, c);
      set_zero(b.grad_queries, count * c.row_lanes);
      Chunk::multiply(grads, c.value_lanes, b.transposed, c.feature_lanes, b.grad_features, count, p_.value_dim + 1,
                      false);
      c.add_gradient(c.queries, b.grad_features, count, b.grad_queries);
      if (p_.is_causal) add_by_pairs(grads, first, count, kept, b);
      c.store_rows(b.grad_queries, c.queries, p_.grad_query, batch, head, first, count,
                   p_.taylor ? Sum(p_.scale) : Sum(1));
    }
  }

  // This makes row i of G.
  void read_gradient(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t i, Sum* grads,
                     const Chunk& c) const {
    Sum* const grad = grads + i * c.value_lanes;
    set_zero(grad, c.value_lanes);
    if (!p_.grad_output.data) return;
    const Sum* const output = c.outputs + i * c.value_lanes;
    const Sum n = output[p_.value_dim], factor = n == 0 ? 0 : 1 / n;
    convert_row(grad, row_of<const Input>(p_.grad_output, batch, head, row), p_.value_dim);
    Sum dot = 0;
    for (std::int64_t d = 0; d < p_.value_dim; ++d) {
      grad[d] *= factor;
      dot += grad[d] * output[d];
    }
    grad[p_.value_dim] = -dot * factor;
  }

  void add_by_pairs(const Sum* grads, std::int64_t first, std::int64_t count, const Kept& kept,
                    const Buffers& b) const {
    const Chunk& c = b.chunk;
    constexpr std::int64_t kTokens = Chunk::kTokens;
    c.transpose(c.values, c.value_lanes, count, p_.value_dim + 1, c.by_column, kTokens);
    Chunk::multiply(grads, c.value_lanes, c.by_column, kTokens, b.grad_weights, count, p_.value_dim + 1, false);
    for (std::int64_t i = 0; i < count * kTokens; ++i) b.grad_weights[i] *= c.slopes[i];
    multiply_lower(b.grad_weights, kTokens, c.keys, c.row_lanes, b.grad_queries, count, true);
    multiply_lower_transposed(b.grad_weights, kTokens, c.queries, c.row_lanes, kept.grad_keys + first * c.row_lanes,
                              count, true);
    multiply_lower_transposed(c.weights, kTokens, grads, c.value_lanes, kept.grad_values + first * c.value_lanes, count,
                              true);
  }

  void add_queries(std::int64_t batch, std::int64_t key_head, std::int64_t first, FeatureRows rows, Sum* state,
                   const Kept& kept, const Chunk& c) const {
    for (std::int64_t g = 0; g < c.group; ++g) {
      c.load_queries(batch, key_head * c.group + g, first);
      c.add_products(c.of_queries, grad_outputs(kept, g, first, c), c.tokens(first, p_.length_q), rows, state);
    }
  }

  // This makes the gradients of keys and values.
  void go_back(std::int64_t batch, std::int64_t head, std::int64_t first, const Sum* state, const Kept& kept,
               const Buffers& b) const {
    const Chunk& c = b.chunk;
    const std::int64_t count = c.tokens(first, p_.length_k);
    Sum *const grad_keys = kept.grad_keys + first * c.row_lanes, *const grad_values =
                                                                     kept.grad_values + first * c.value_lanes;
    c.load_keys(batch, head, first);
    Chunk::multiply(c.of_keys, c.feature_lanes, state, c.value_lanes, grad_values, count, c.features, true);
    for (std::int64_t i = 0; i < count; ++i)
      convert_row(row_of<Input>(p_.grad_value, batch, head, first + i), grad_values + i * c.value_lanes, p_.value_dim);
    c.transpose(state, c.value_lanes, c.features, p_.value_dim + 1, b.transposed, c.feature_lanes);
    Chunk::multiply(c.values, c.value_lanes, b.transposed, c.feature_lanes, b.grad_features, count, p_.value_dim + 1,
                    false);
    c.add_gradient(c.keys, b.grad_features, count, grad_keys);
    c.store_rows(grad_keys, c.keys, p_.grad_key, batch, head, first, count, 1);
  }

  const LinearStateBackwardParams& p_;
  const Executor& executor_;
  LinearStateSlices slices_;
};

}  // namespace attnx::cpu::ATTNX_ISA
