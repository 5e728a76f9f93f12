// This is the backward of the gated delta rule: it goes forward through the chunks, keeps the state before each and its
// differences, and goes back.
//
// A unit of work takes a head of keys and the states of its heads of values. Where threads outnumber the heads of keys,
// there are two phases instead: in the first units take some columns of a head of values both ways, and keep what they
// find; in the second each chunk of a head of keys is a unit. What is computed is the same, in the same order.
#pragma once

#include "../phases.h"
#include "../units.h"
#include "gradients.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class DeltaRuleBackward {
  using Gradients = DeltaRuleGradients<Input>;
  using Chunk = DeltaRuleChunk<Input>;
  using Sum = typename Chunk::Sum;
  static constexpr std::int64_t kLeastColumns = 32;  // of a unit: each makes the products of keys for itself

 public:
  DeltaRuleBackward(const DeltaRuleBackwardParams& p, const Executor& executor)
      : p_(p),
        executor_(executor),
        group_(p.heads_v / p.heads_k),
        chunks_(p.chunks()),
        lanes_(round_up(p.value_dim, kLanes<Sum>)),
        slice_lanes_(lanes_),
        by_columns_(p.batch * p.heads_k > 0 && p.batch * p.heads_k < executor.threads && chunks_ > 1) {
    if (!by_columns_) return;
    const std::int64_t heads = p.batch * p.heads_v, most = larger<std::int64_t>(p.value_dim / kLeastColumns, 1);
    const std::int64_t slices = smaller((executor.threads + heads - 1) / heads, most);
    slice_lanes_ = round_up((p.value_dim + slices - 1) / slices, kLanes<Sum>);
  }

  std::int64_t workspace_bytes() const {
    return by_columns_ ? InTwoPhases(*this, nullptr).bytes : executor_.threads * Buffers(*this, nullptr).bytes;
  }

  void run(char* workspace) const {
    if (by_columns_) return run_in_two_phases(workspace);
    for_each_unit(executor_, p_.batch * p_.heads_k, workspace, Buffers(*this, nullptr).bytes,
                  [&](std::int64_t unit, char* memory) {
                    Buffers b(*this, memory);
                    visit(unit / p_.heads_k, unit % p_.heads_k, b);
                  });
  }

 private:
  // What a head of values keeps of its chunks, with all columns.
  struct Kept {
    Sum* states;       // before each chunk, [chunks][key_dim][lanes]
    Sum* differences;  // [chunks][kChunk][lanes]
    Sum* grad_states;  // after each chunk, like states, or the present one
    Sum* z;            // like differences
  };

  struct Buffers {
    Gradients gradients;
    Sum *states, *differences;  // of a group of heads of values
    Sum* grad_states;           // [group][key_dim][lanes]
    Sum* corrections;           // beta D
    std::int64_t bytes;

    Buffers(const DeltaRuleBackward& f, char* memory) : Buffers(f, Arena(memory)) {}

   private:
    Buffers(const DeltaRuleBackward& f, Arena arena) : gradients(f.p_, f.lanes_, arena) {
      states = arena.take<Sum>(f.group_ * larger<std::int64_t>(f.chunks_, 1) * f.state_size());
      differences = arena.take<Sum>(f.group_ * f.chunks_ * kChunk * f.lanes_);
      grad_states = arena.take<Sum>(f.group_ * f.state_size());
      corrections = arena.take<Sum>(Chunk::rows_size(kChunk, f.lanes_));
      bytes = arena.used();
    }
  };

  // Each worker has memory for either phase.
  struct InTwoPhases {
    Phases phases;
    Sum *states, *differences, *grad_states, *z;  // of all heads of values
    char* of_workers;
    std::int64_t worker_bytes, bytes;

    InTwoPhases(const DeltaRuleBackward& f, char* memory) : InTwoPhases(f, memory, Arena(memory)) {}

   private:
    InTwoPhases(const DeltaRuleBackward& f, char* memory, Arena arena) : phases(arena, 2, 1) {
      const std::int64_t heads = f.p_.batch * f.p_.heads_v;
      states = arena.take<Sum>(heads * f.chunks_ * f.state_size());
      grad_states = arena.take<Sum>(heads * f.chunks_ * f.state_size());
      differences = arena.take<Sum>(heads * f.chunks_ * kChunk * f.lanes_);
      z = arena.take<Sum>(heads * f.chunks_ * kChunk * f.lanes_);
      worker_bytes = larger(Slice(f, nullptr).bytes, Whole(f, nullptr).bytes);
      of_workers = memory + arena.used();
      bytes = arena.used() + f.executor_.threads * worker_bytes;
    }
  };
  struct Slice {
    Gradients gradients;
    Sum *state, *corrections;
    std::int64_t bytes;

    Slice(const DeltaRuleBackward& f, char* memory) : Slice(f, Arena(memory)) {}

   private:
    Slice(const DeltaRuleBackward& f, Arena arena)
        : gradients(f.p_, f.slice_lanes_, arena),
          state(arena.take<Sum>(f.p_.key_dim * f.slice_lanes_)),
          corrections(arena.take<Sum>(Chunk::rows_size(kChunk, f.slice_lanes_))),
          bytes(arena.used()) {}
  };
  struct Whole {
    Gradients gradients;
    std::int64_t bytes;

    Whole(const DeltaRuleBackward& f, char* memory) : Whole(f, Arena(memory)) {}

   private:
    Whole(const DeltaRuleBackward& f, Arena arena) : gradients(f.p_, f.lanes_, arena), bytes(arena.used()) {}
  };

  std::int64_t state_size() const { return p_.key_dim * lanes_; }
  std::int64_t chunk_size() const { return kChunk * lanes_; }
  ValueColumns all_columns() const { return {0, p_.value_dim, lanes_}; }

  void visit(std::int64_t batch, std::int64_t key_head, Buffers& b) const {
    Gradients& x = b.gradients;
    Chunk& c = x.chunk;
    const auto kept = [&](std::int64_t g) {
      return Kept{b.states + g * chunks_ * state_size(), b.differences + g * chunks_ * chunk_size(),
                  b.grad_states + g * state_size(), nullptr};
    };
    for (std::int64_t g = 0; g < group_; ++g) {
      c.load_state(p_.initial_state, batch, key_head * group_ + g, all_columns(), kept(g).states);
      c.load_state(p_.grad_state, batch, key_head * group_ + g, all_columns(), kept(g).grad_states);
    }
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
      c.begin(batch, key_head, chunk * kChunk, false);
      for (std::int64_t g = 0; g < group_; ++g) {
        Sum* const before = kept(g).states + chunk * state_size();
        go_forward(batch, key_head * group_ + g, chunk, all_columns(), before, b.corrections, c);
        convert_row(kept(g).differences + chunk * chunk_size(), c.differences, c.count * lanes_);
        if (chunk + 1 == chunks_) continue;
        convert_row(before + state_size(), before, state_size());
        c.advance(b.corrections, before + state_size());
      }
    }
    for (std::int64_t chunk = chunks_ - 1; chunk >= 0; --chunk) {
      const std::int64_t first = chunk * kChunk;
      x.begin(batch, key_head, first);
      for (std::int64_t g = 0; g < group_; ++g) {
        const std::int64_t head = key_head * group_ + g;
        go_back(batch, head, first, all_columns(), kept(g).grad_states, x);
        x.add_head(batch, head, first, kept(g).states + chunk * state_size(),
                   kept(g).differences + chunk * chunk_size(), kept(g).grad_states);
        x.pass_state(kept(g).grad_states);
      }
      x.store_grad_inputs(batch, key_head, first);
    }
    for (std::int64_t g = 0; g < group_; ++g)
      c.store_state(kept(g).grad_states, p_.grad_initial_state, batch, key_head * group_ + g, all_columns());
  }

  // This finds the differences of a loaded chunk, and beta times them.
  void go_forward(std::int64_t batch, std::int64_t head, std::int64_t chunk, ValueColumns columns, const Sum* before,
                  Sum* corrections, Chunk& c) const {
    c.set_gates(batch, head, chunk * kChunk);
    c.find_differences(batch, head, chunk * kChunk, columns, before, false);
    c.scale_rows(c.differences, columns.lanes, c.gates->beta, Sum(1), corrections);
  }

  // This makes the gradients of values.
  void go_back(std::int64_t batch, std::int64_t head, std::int64_t first, ValueColumns columns, const Sum* grad_state,
               Gradients& x) const {
    x.set_head(batch, head, first, columns);
    x.find_z(grad_state);
    x.find_grad_values();
    x.store_grad_values(batch, head, first, columns);
  }

  void run_in_two_phases(char* workspace) const {
    const InTwoPhases shared(*this, workspace);
    const std::int64_t slices = (p_.value_dim + slice_lanes_ - 1) / slice_lanes_;
    const auto kept = [&](std::int64_t head) {
      return Kept{shared.states + head * chunks_ * state_size(), shared.differences + head * chunks_ * chunk_size(),
                  shared.grad_states + head * chunks_ * state_size(), shared.z + head * chunks_ * chunk_size()};
    };
    shared.phases.run(
        executor_,
        [&](std::int64_t phase) {
          return phase == 0 ? p_.batch * p_.heads_v * slices : p_.batch * p_.heads_k * chunks_;
        },
        [&](std::int64_t phase, std::int64_t unit, int worker) {
          char* const memory = shared.of_workers + worker * shared.worker_bytes;
          if (phase == 0) {
            const std::int64_t head = unit / slices, first = unit % slices * slice_lanes_;
            const ValueColumns columns{first, smaller(slice_lanes_, p_.value_dim - first), slice_lanes_};
            Slice b(*this, memory);
            scan(head / p_.heads_v, head % p_.heads_v, columns, kept(head), b);
          } else {
            const std::int64_t head = unit / chunks_;
            Whole b(*this, memory);
            find_inputs(head / p_.heads_k, head % p_.heads_k, unit % chunks_, kept, b.gradients);
          }
        });
  }

  // This takes some columns of a head of values through all chunks, forward and back.
  void scan(std::int64_t batch, std::int64_t head, ValueColumns columns, const Kept& kept, Slice& b) const {
    Gradients& x = b.gradients;
    Chunk& c = x.chunk;
    c.load_state(p_.initial_state, batch, head, columns, b.state);
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
      c.begin(batch, head / group_, chunk * kChunk, false);
      put(b.state, p_.key_dim, columns, kept.states + chunk * state_size());
      go_forward(batch, head, chunk, columns, b.state, b.corrections, c);
      put(c.differences, c.count, columns, kept.differences + chunk * chunk_size());
      c.advance(b.corrections, b.state);
    }
    c.load_state(p_.grad_state, batch, head, columns, b.state);
    for (std::int64_t chunk = chunks_ - 1; chunk >= 0; --chunk) {
      x.begin(batch, head / group_, chunk * kChunk);
      put(b.state, p_.key_dim, columns, kept.grad_states + chunk * state_size());
      go_back(batch, head, chunk * kChunk, columns, b.state, x);
      put(x.z, c.count, columns, kept.z + chunk * chunk_size());
      x.pass_state(b.state);
    }
    c.store_state(b.state, p_.grad_initial_state, batch, head, columns);
  }

  // This makes the gradients of a chunk of queries and keys, and those of gates.
  template <class KeptOf>
  void find_inputs(std::int64_t batch, std::int64_t key_head, std::int64_t chunk, const KeptOf& kept,
                   Gradients& x) const {
    const std::int64_t first = chunk * kChunk;
    x.begin(batch, key_head, first);
    for (std::int64_t g = 0; g < group_; ++g) {
      const std::int64_t head = key_head * group_ + g;
      const Kept of_head = kept(batch * p_.heads_v + head);
      x.set_head(batch, head, first, all_columns());
      convert_row(x.z, of_head.z + chunk * chunk_size(), x.chunk.count * lanes_);
      x.find_grad_values();
      x.add_head(batch, head, first, of_head.states + chunk * state_size(), of_head.differences + chunk * chunk_size(),
                 of_head.grad_states + chunk * state_size());
    }
    x.store_grad_inputs(batch, key_head, first);
  }

  // This puts rows of some columns among all columns.
  void put(const Sum* from, std::int64_t rows, ValueColumns columns, Sum* to) const {
    const std::int64_t count = smaller(columns.lanes, lanes_ - columns.first);
    for (std::int64_t i = 0; i < rows; ++i)
      convert_row(to + i * lanes_ + columns.first, from + i * columns.lanes, count);
  }

  const DeltaRuleBackwardParams& p_;
  const Executor& executor_;
  std::int64_t group_, chunks_, lanes_, slice_lanes_;
  bool by_columns_;
};

}  // namespace attnx::cpu::ATTNX_ISA
