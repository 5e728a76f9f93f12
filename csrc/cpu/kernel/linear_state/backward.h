// This is the backward of linear attention with a state. With y = N / n of a row, G = [dO / n, -(dO . y) / n] is the
// gradient of [N, n]. On the way forward through the chunks the states give dphi(Q) = G S^T; on the way back T, the sum
// of phi(q) G^T of later queries on the gradient of the last state, gives dphi(K) = [V, 1] T^T and dV = phi(K) T.
#pragma once

#include "../units.h"
#include "chunk.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class LinearStateBackward {
  using Chunk = LinearStateChunk<Input>;
  using Sum = typename Chunk::Sum;

 public:
  LinearStateBackward(const LinearStateBackwardParams& p, const Executor& executor) : p_(p), executor_(executor) {}

  std::int64_t workspace_bytes() const { return executor_.threads * Buffers(*this, nullptr).bytes; }

  void run(char* workspace) const {
    for_each_unit(
        executor_, p_.batch * p_.heads_k, workspace, Buffers(*this, nullptr).bytes,
        [&](std::int64_t unit, char* memory) { visit(unit / p_.heads_k, unit % p_.heads_k, Buffers(*this, memory)); });
  }

 private:
  struct Buffers {
    Chunk chunk;
    Sum* state;         // S, then T
    Sum* transposed;    // of either, [value_dim + 1][feature_lanes]
    Sum* grad_outputs;  // G of all rows, [group][length_q][value_lanes]
    Sum* grad_values;   // what the pairs of chunks add, [length_k][value_lanes]
    Sum* grad_keys;     // likewise, [length_k][row_lanes]
    Sum* grad_queries;  // [kTokens][row_lanes]
    Sum* grad_features;
    Sum* grad_weights;  // of pairs, times their slopes
    std::int64_t bytes;

    Buffers(const LinearStateBackward& f, char* memory) : Buffers(f, Arena(memory)) {}

   private:
    Buffers(const LinearStateBackward& f, Arena arena) : chunk(f.p_, arena) {
      const auto take = [&](std::int64_t rows, std::int64_t lanes) {
        return arena.take<Sum>(Chunk::rows_size(rows, lanes));
      };
      state = arena.take<Sum>(chunk.state_size());
      transposed = arena.take<Sum>((f.p_.value_dim + 1) * chunk.feature_lanes);
      grad_outputs = take(chunk.group * f.p_.length_q, chunk.value_lanes);
      grad_values = take(f.p_.length_k, chunk.value_lanes);
      grad_keys = take(f.p_.length_k, chunk.row_lanes);
      grad_queries = take(Chunk::kTokens, chunk.row_lanes);
      grad_features = take(Chunk::kTokens, chunk.feature_lanes);
      grad_weights = take(Chunk::kTokens, Chunk::kTokens);
      bytes = arena.used();
    }
  };

  Sum* grad_outputs(const Buffers& b, std::int64_t of_group, std::int64_t first) const {
    return b.grad_outputs + (of_group * p_.length_q + first) * b.chunk.value_lanes;
  }

  void visit(std::int64_t batch, std::int64_t head, const Buffers& b) const {
    const Chunk& c = b.chunk;
    set_zero(b.grad_values, p_.length_k * c.value_lanes);
    set_zero(b.grad_keys, p_.length_k * c.row_lanes);
    c.load_state(p_.initial_state, batch, head, b.state);
    for (std::int64_t first = 0; first < p_.length_k; first += Chunk::kTokens) {
      c.load_keys(batch, head, first);
      if (p_.is_causal) go_forward(batch, head, first, b);
      c.add_keys(c.tokens(first, p_.length_k), b.state);
    }
    for (std::int64_t first = 0; !p_.is_causal && first < p_.length_q; first += Chunk::kTokens)
      go_forward(batch, head, first, b);

    c.load_state(p_.grad_state, batch, head, b.state);
    for (std::int64_t first = 0; !p_.is_causal && first < p_.length_q; first += Chunk::kTokens)
      add_queries(batch, head, first, b);
    const std::int64_t chunks = (p_.length_k + Chunk::kTokens - 1) / Chunk::kTokens;
    for (std::int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      go_back(batch, head, chunk * Chunk::kTokens, b);
      if (p_.is_causal) add_queries(batch, head, chunk * Chunk::kTokens, b);
    }
    c.store_state(b.state, p_.grad_initial_state, batch, head);
  }

  // This makes the gradients of queries, and what pairs of the chunk add to those of keys and values.
  void go_forward(std::int64_t batch, std::int64_t key_head, std::int64_t first, const Buffers& b) const {
    const Chunk& c = b.chunk;
    const std::int64_t count = c.tokens(first, p_.length_q);
    c.transpose(b.state, c.value_lanes, c.features, p_.value_dim + 1, b.transposed, c.feature_lanes);
    for (std::int64_t g = 0; g < c.group; ++g) {
      const std::int64_t head = key_head * c.group + g;
      Sum* const grads = grad_outputs(b, g, first);
      c.load_queries(batch, head, first);
      if (p_.is_causal) c.weigh_pairs(count, count, true);
      c.attend(count, b.state, p_.is_causal);
      for (std::int64_t i = 0; i < count; ++i) read_gradient(batch, head, first + i, i, grads, c);
      set_zero(b.grad_queries, count * c.row_lanes);
      Chunk::multiply(grads, c.value_lanes, b.transposed, c.feature_lanes, b.grad_features, count, p_.value_dim + 1,
                      false);
      c.add_gradient(c.queries, b.grad_features, count, b.grad_queries);
      if (p_.is_causal) add_by_pairs(grads, first, count, b);
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

  void add_by_pairs(const Sum* grads, std::int64_t first, std::int64_t count, const Buffers& b) const {
    const Chunk& c = b.chunk;
    constexpr std::int64_t kTokens = Chunk::kTokens;
    c.transpose(c.values, c.value_lanes, count, p_.value_dim + 1, c.by_column, kTokens);
    Chunk::multiply(grads, c.value_lanes, c.by_column, kTokens, b.grad_weights, count, p_.value_dim + 1, false);
    for (std::int64_t i = 0; i < count * kTokens; ++i) b.grad_weights[i] *= c.slopes[i];
    multiply_lower(b.grad_weights, kTokens, c.keys, c.row_lanes, b.grad_queries, count, true);
    multiply_lower_transposed(b.grad_weights, kTokens, c.queries, c.row_lanes, b.grad_keys + first * c.row_lanes, count,
                              true);
    multiply_lower_transposed(c.weights, kTokens, grads, c.value_lanes, b.grad_values + first * c.value_lanes, count,
                              true);
  }

  void add_queries(std::int64_t batch, std::int64_t key_head, std::int64_t first, const Buffers& b) const {
    const Chunk& c = b.chunk;
    for (std::int64_t g = 0; g < c.group; ++g) {
      c.load_queries(batch, key_head * c.group + g, first);
      Chunk::multiply_transposed(c.of_queries, c.feature_lanes, grad_outputs(b, g, first), c.value_lanes, b.state,
                                 c.features, c.tokens(first, p_.length_q), true);
    }
  }

  // This makes the gradients of keys and values.
  void go_back(std::int64_t batch, std::int64_t head, std::int64_t first, const Buffers& b) const {
    const Chunk& c = b.chunk;
    const std::int64_t count = c.tokens(first, p_.length_k);
    Sum *const grad_keys = b.grad_keys + first * c.row_lanes, *const grad_values =
                                                                  b.grad_values + first * c.value_lanes;
    c.load_keys(batch, head, first);
    Chunk::multiply(c.of_keys, c.feature_lanes, b.state, c.value_lanes, grad_values, count, c.features, true);
    for (std::int64_t i = 0; i < count; ++i)
      convert_row(row_of<Input>(p_.grad_value, batch, head, first + i), grad_values + i * c.value_lanes, p_.value_dim);
    c.transpose(b.state, c.value_lanes, c.features, p_.value_dim + 1, b.transposed, c.feature_lanes);
    Chunk::multiply(c.values, c.value_lanes, b.transposed, c.feature_lanes, b.grad_features, count, p_.value_dim + 1,
                    false);
    c.add_gradient(c.keys, b.grad_features, count, grad_keys);
    c.store_rows(grad_keys, c.keys, p_.grad_key, batch, head, first, count, 1);
  }

  const LinearStateBackwardParams& p_;
  const Executor& executor_;
};

}  // namespace attnx::cpu::ATTNX_ISA
