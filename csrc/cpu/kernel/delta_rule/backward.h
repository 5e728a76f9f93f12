// This is the backward of the gated delta rule. A unit of work takes a head of keys and the states of its heads of
// values: it goes forward through the chunks, keeps the state before each and its differences D, and goes back. With dS
// the gradient of the state after a chunk, and W, P, D and G as in chunk.h,
//
//     Z = P^T dO + c e^(G_n - G) K dS - W^T beta Z     dV = beta Z      dbeta_i = d_i . z_i
//     dW = -dV (beta D)^T (j < i)                      dP = dO (beta D)^T (j <= i)
//     dQ = scale e^G dO S^T + (scale e^(G_i - G_j) dP) K
//     dK = c e^(G_n - G) beta D dS^T - e^G dV S^T + (scale e^(G_i - G_j) dP)^T Q + (M + M^T) K,  M = e^(G_i - G_j) dW
//     dS <- e^G_n dS + (scale e^G Q)^T dO - (e^G K)^T dV
//
// and dG_i is what each exponential adds: a product with its own gradient. dc is that of e^(G_n - G) K and beta D dS^T.
#pragma once

#include "../units.h"
#include "chunk.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class DeltaRuleBackward {
  using Chunk = DeltaRuleChunk<Input>;
  using Sum = typename Chunk::Sum;

 public:
  DeltaRuleBackward(const DeltaRuleBackwardParams& p, const Executor& executor)
      : p_(p),
        executor_(executor),
        group_(p.heads_v / p.heads_k),
        chunks_(p.chunks()),
        key_lanes_(round_up(p.key_dim, kLanes<Sum>)),
        value_lanes_(round_up(p.value_dim, kLanes<Sum>)) {}

  std::int64_t workspace_bytes() const { return executor_.threads * Buffers(*this, nullptr).bytes; }

  void run(char* workspace) const {
    for_each_unit(executor_, p_.batch * p_.heads_k, workspace, Buffers(*this, nullptr).bytes,
                  [&](std::int64_t unit, char* memory) {
                    Buffers b(*this, memory);
                    visit(unit / p_.heads_k, unit % p_.heads_k, b);
                  });
  }

 private:
  struct Buffers {
    Chunk chunk;
    Sum* states;                 // before each chunk, [group][chunks][key_dim][value_lanes]
    Sum* differences;            // of each chunk, [group][chunks][kChunk][value_lanes]
    Sum* grad_states;            // [group][key_dim][value_lanes]
    Sum* grad_inputs;            // of queries, then of keys, [count][key_lanes]
    Sum* grad_values;            // then the gradients of outputs, [count][value_lanes]
    Sum* z;                      // [count][value_lanes]
    Sum* corrections;            // beta D, [count][value_lanes]
    Sum* by_column;              // a state, or corrections, transposed
    Sum* pairs;                  // of dP, then of M, [count][kChunk]
    Sum* of_states;              // what reaches queries and keys by the states, [2 count][key_lanes]
    Sum *grad_sums, *grad_beta;  // [kChunk]
    std::int64_t bytes;

    Buffers(const DeltaRuleBackward& f, char* memory) : Buffers(f, Arena(memory)) {}

   private:
    Buffers(const DeltaRuleBackward& f, Arena arena) : chunk(f.p_, f.value_lanes_, arena) {
      const auto take = [&](std::int64_t rows, std::int64_t lanes) {
        return arena.take<Sum>(Chunk::rows_size(rows, lanes));
      };
      states = arena.take<Sum>(f.group_ * larger<std::int64_t>(f.chunks_, 1) * f.state_size());
      differences = arena.take<Sum>(f.group_ * f.chunks_ * kChunk * f.value_lanes_);
      grad_states = arena.take<Sum>(f.group_ * f.state_size());
      grad_inputs = take(2 * kChunk, f.key_lanes_);
      grad_values = take(2 * kChunk, f.value_lanes_);
      z = take(kChunk, f.value_lanes_);
      corrections = take(kChunk, f.value_lanes_);
      by_column = arena.take<Sum>(f.p_.value_dim * larger(f.key_lanes_, kChunk));
      pairs = take(2 * kChunk, kChunk);
      of_states = take(2 * kChunk, f.key_lanes_);
      grad_sums = arena.take<Sum>(kChunk);
      grad_beta = arena.take<Sum>(kChunk);
      bytes = arena.used();
    }
  };

  std::int64_t state_size() const { return p_.key_dim * value_lanes_; }
  ValueColumns columns() const { return {0, p_.value_dim, value_lanes_}; }
  Sum* state(const Buffers& b, std::int64_t of_group, std::int64_t chunk) const {
    return b.states + (of_group * chunks_ + chunk) * state_size();
  }
  Sum* differences(const Buffers& b, std::int64_t of_group, std::int64_t chunk) const {
    return b.differences + (of_group * chunks_ + chunk) * kChunk * value_lanes_;
  }

  void visit(std::int64_t batch, std::int64_t key_head, Buffers& b) const {
    for (std::int64_t g = 0; g < group_; ++g) {
      const std::int64_t head = key_head * group_ + g;
      b.chunk.load_state(p_.initial_state, batch, head, columns(), state(b, g, 0));
      b.chunk.load_state(p_.grad_state, batch, head, columns(), b.grad_states + g * state_size());
    }
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
      b.chunk.begin(batch, key_head, chunk * kChunk, false);
      for (std::int64_t g = 0; g < group_; ++g) go_forward(batch, key_head * group_ + g, g, chunk, b);
    }
    for (std::int64_t chunk = chunks_ - 1; chunk >= 0; --chunk) {
      const std::int64_t first = chunk * kChunk;
      Chunk& c = b.chunk;
      c.begin(batch, key_head, first, true);
      set_zero(b.grad_inputs, 2 * c.count * key_lanes_);
      for (std::int64_t g = 0; g < group_; ++g) go_back(batch, key_head * group_ + g, g, chunk, b);
      if (p_.normalize) pass_norms(b);
      const ValueColumns features{0, p_.key_dim, key_lanes_};
      c.store_tokens(b.grad_inputs, p_.grad_query, batch, key_head, first, features);
      c.store_tokens(b.grad_inputs + c.count * key_lanes_, p_.grad_key, batch, key_head, first, features);
    }
    for (std::int64_t g = 0; g < group_; ++g)
      b.chunk.store_state(b.grad_states + g * state_size(), p_.grad_initial_state, batch, key_head * group_ + g,
                          columns());
  }

  void go_forward(std::int64_t batch, std::int64_t head, std::int64_t g, std::int64_t chunk, Buffers& b) const {
    Chunk& c = b.chunk;
    const Sum* const before = state(b, g, chunk);
    c.set_gates(batch, head, chunk * kChunk);
    c.find_differences(batch, head, chunk * kChunk, columns(), before, false);
    convert_row(differences(b, g, chunk), c.differences, c.count * value_lanes_);
    if (chunk + 1 == chunks_) return;
    Sum* const after = state(b, g, chunk + 1);
    c.scale_rows(c.differences, value_lanes_, c.gates->beta, Sum(1), b.corrections);
    convert_row(after, before, state_size());
    c.advance(b.corrections, after);
  }

  void go_back(std::int64_t batch, std::int64_t head, std::int64_t g, std::int64_t chunk, Buffers& b) const {
    Chunk& c = b.chunk;
    const std::int64_t first = chunk * kChunk, count = c.count;
    const Sum *const before = state(b, g, chunk), *const found = differences(b, g, chunk);
    Sum *const grad_state = b.grad_states + g * state_size(), *const grad_outputs =
                                                                  b.grad_values + count * value_lanes_;
    c.set_gates(batch, head, first);
    if (p_.grad_output.data) {
      c.load_tokens(p_.grad_output, batch, head, first, columns(), grad_outputs);
    } else {
      set_zero(grad_outputs, count * value_lanes_);
    }
    c.scale_rows(found, value_lanes_, c.gates->beta, Sum(1), b.corrections);
    set_zero(b.grad_sums, kChunk);
    b.grad_sums[count - 1] = c.gates->whole * dot(before, grad_state, state_size());

    find_grad_values(grad_state, grad_outputs, b);
    for (std::int64_t i = 0; i < count; ++i)
      b.grad_beta[i] = dot(found + i * value_lanes_, b.z + i * value_lanes_, value_lanes_);
    c.scale_rows(b.z, value_lanes_, c.gates->beta, Sum(1), b.grad_values);
    c.store_tokens(b.grad_values, p_.grad_value, batch, head, first, columns());

    const Sum grad_carry = add_by_states(before, grad_state, grad_outputs, b);
    static_cast<Sum*>(p_.grad_carry)[(batch * p_.heads_v + head) * chunks_ + chunk] = grad_carry;
    add_by_pairs(b);
    pass_state(grad_outputs, grad_state, b);
    store_gates(batch, head, first, b);
  }

  // This finds Z. The factors of scale P^T dO are a copy of the products of queries.
  void find_grad_values(const Sum* grad_state, const Sum* grad_outputs, Buffers& b) const {
    Chunk& c = b.chunk;
    for (std::int64_t i = 0; i < c.count * kChunk; ++i) b.pairs[i] = Sum(p_.scale) * c.decays[i] * c.of_queries[i];
    multiply_lower_transposed(b.pairs, kChunk, grad_outputs, value_lanes_, b.z, c.count, false);
    c.scale_rows(c.keys, key_lanes_, c.gates->to_state, Sum(1), c.scaled);
    Chunk::multiply(c.scaled, key_lanes_, grad_state, value_lanes_, b.z, c.count, p_.key_dim, true);
    for (std::int64_t i = 0; i < c.count; ++i) {
      Sum *const to = b.pairs + i * kChunk, *const decays = c.decays + i * kChunk,
                 *const products = c.of_keys + i * kChunk;
      for (std::int64_t j = 0; j < kChunk; ++j) to[j] = -c.gates->beta[i] * decays[j] * products[j];
    }
    solve_lower_transposed(b.pairs, kChunk, b.z, value_lanes_, c.count);
  }

  // This adds what reaches queries and keys by the states before and after the chunk, and returns the gradient of c.
  Sum add_by_states(const Sum* before, const Sum* grad_state, const Sum* grad_outputs, Buffers& b) const {
    Chunk& c = b.chunk;
    Sum* const to_keys = b.of_states + c.count * key_lanes_;
    Chunk::transpose(before, value_lanes_, p_.key_dim, p_.value_dim, b.by_column, key_lanes_);
    Chunk::multiply(grad_outputs, value_lanes_, b.by_column, key_lanes_, b.of_states, c.count, p_.value_dim, false);
    c.scale_rows(b.of_states, key_lanes_, c.gates->from_start, Sum(p_.scale), b.of_states);
    Chunk::multiply(b.grad_values, value_lanes_, b.by_column, key_lanes_, to_keys, c.count, p_.value_dim, false);
    c.scale_rows(to_keys, key_lanes_, c.gates->from_start, Sum(-1), to_keys);
    for (std::int64_t i = 0; i < c.count; ++i)
      b.grad_sums[i] += dot_of_rows(b.of_states, c.queries, i) + dot_of_rows(to_keys, c.keys, i);
    const std::int64_t size = c.count * key_lanes_;
    for (std::int64_t i = 0; i < 2 * size; ++i) b.grad_inputs[i] += b.of_states[i];

    Chunk::transpose(grad_state, value_lanes_, p_.key_dim, p_.value_dim, b.by_column, key_lanes_);
    Chunk::multiply(b.corrections, value_lanes_, b.by_column, key_lanes_, to_keys, c.count, p_.value_dim, false);
    c.scale_rows(to_keys, key_lanes_, c.gates->to_end, Sum(1), to_keys);
    // These are the gradients of e^(G_n - G_i), which is 1 for the last token.
    Sum grad_carry = 0;
    for (std::int64_t i = 0; i < c.count; ++i) {
      const Sum both = dot_of_rows(to_keys, c.keys, i);
      grad_carry += both;
      if (i == c.count - 1) break;
      b.grad_sums[i] -= c.gates->carry * both;
      b.grad_sums[c.count - 1] += c.gates->carry * both;
    }
    for (std::int64_t i = 0; i < size; ++i) b.grad_inputs[size + i] += c.gates->carry * to_keys[i];
    return grad_carry;
  }
  Sum dot_of_rows(const Sum* x, const Sum* y, std::int64_t i) const {
    return dot(x + i * key_lanes_, y + i * key_lanes_, key_lanes_);
  }

  // This adds what reaches queries and keys by the pairs of tokens of the chunk: dP and M + M^T are the factors of
  // keys.
  void add_by_pairs(Buffers& b) const {
    Chunk& c = b.chunk;
    const std::int64_t count = c.count;
    Sum *const of_queries = b.pairs, *const of_keys = b.pairs + count * kChunk;
    Sum* const grad_keys = b.grad_inputs + count * key_lanes_;
    Chunk::transpose(b.corrections, value_lanes_, count, p_.value_dim, b.by_column, kChunk);
    Chunk::multiply(b.grad_values + count * value_lanes_, value_lanes_, b.by_column, kChunk, of_queries, count,
                    p_.value_dim, false);
    Chunk::multiply(b.grad_values, value_lanes_, b.by_column, kChunk, of_keys, count, p_.value_dim, false);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t row = i * kChunk;
      Sum sum = 0;
      for (std::int64_t j = 0; j < kChunk; ++j) {
        of_queries[row + j] *= Sum(p_.scale) * c.decays[row + j];
        of_keys[row + j] *= -c.decays[row + j];
      }
      of_keys[row + i] = 0;
      for (std::int64_t j = 0; j < i; ++j) {
        const Sum both = of_queries[row + j] * c.of_queries[row + j] + of_keys[row + j] * c.of_keys[row + j];
        sum += both;
        b.grad_sums[j] -= both;
      }
      b.grad_sums[i] += sum;
    }
    Chunk::multiply_transposed(of_queries, kChunk, c.queries, key_lanes_, grad_keys, count, count, true);
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t j = 0; j < i; ++j) of_keys[j * kChunk + i] = of_keys[i * kChunk + j];
    Chunk::multiply(b.pairs, kChunk, c.keys, key_lanes_, b.grad_inputs, 2 * count, count, true);
  }

  // Gradients of x / |x| become those of x. Those of queries are first, and the rows of keys.
  void pass_norms(Buffers& b) const {
    const Chunk& c = b.chunk;
    for (std::int64_t i = 0; i < 2 * c.count; ++i) {
      const std::int64_t place = (i + c.count) % (2 * c.count);
      const Sum* const row = c.keys + place * key_lanes_;
      Sum* const grad = b.grad_inputs + i * key_lanes_;
      const Sum product = dot(grad, row, key_lanes_), factor = c.inverse_norms[place];
      for (std::int64_t d = 0; d < key_lanes_; ++d) grad[d] = factor * (grad[d] - product * row[d]);
    }
  }

  // The gradient of the state before the chunk takes the place of that after it.
  void pass_state(const Sum* grad_outputs, Sum* grad_state, Buffers& b) const {
    Chunk& c = b.chunk;
    for (std::int64_t i = 0; i < state_size(); ++i) grad_state[i] *= c.gates->whole;
    c.scale_rows(c.queries, key_lanes_, c.gates->from_start, Sum(p_.scale), c.scaled);
    Chunk::multiply_transposed(c.scaled, key_lanes_, grad_outputs, value_lanes_, grad_state, p_.key_dim, c.count, true);
    c.scale_rows(c.keys, key_lanes_, c.gates->from_start, Sum(-1), c.scaled);
    Chunk::multiply_transposed(c.scaled, key_lanes_, b.grad_values, value_lanes_, grad_state, p_.key_dim, c.count,
                               true);
  }

  // A log decay is in its own sum and in those of all later tokens of the chunk.
  void store_gates(std::int64_t batch, std::int64_t head, std::int64_t first, const Buffers& b) const {
    const std::int64_t place = (batch * p_.heads_v + head) * p_.length + first;
    convert_row(static_cast<Sum*>(p_.grad_beta) + place, b.grad_beta, b.chunk.count);
    Sum* const to = static_cast<Sum*>(p_.grad_log_decay) + place;
    Sum sum = 0;
    for (std::int64_t i = b.chunk.count - 1; i >= 0; --i) to[i] = sum += b.grad_sums[i];
  }

  // n is a whole number of vectors. A long sum is one of shorter ones.
  static Sum dot(const Sum* x, const Sum* y, std::int64_t n) {
    constexpr std::int64_t kPart = 16 * kLanes<Sum>;
    Vec<Sum> all = {};
    for (std::int64_t first = 0; first < n; first += kPart) {
      Vec<Sum> sum = {};
      for (std::int64_t i = first; i < smaller(first + kPart, n); i += kLanes<Sum>) sum += load(x + i) * load(y + i);
      all += sum;
    }
    return sum_of_lanes<Sum>(all);
  }

  const DeltaRuleBackwardParams& p_;
  const Executor& executor_;
  std::int64_t group_, chunks_, key_lanes_, value_lanes_;
};

}  // namespace attnx::cpu::ATTNX_ISA
