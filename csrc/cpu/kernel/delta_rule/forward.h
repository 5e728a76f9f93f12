// This is the forward of the gated delta rule: a unit of work takes some columns of the state of a head through all
// chunks, or through single tokens where there are few.
#pragma once

#include "../units.h"
#include "chunk.h"
#include "step.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class DeltaRuleForward {
  using Chunk = DeltaRuleChunk<Input>;
  using Sum = typename Chunk::Sum;
  static constexpr std::int64_t kLeastColumns = 32;  // of a unit: each makes the products of keys for itself

 public:
  DeltaRuleForward(const DeltaRuleForwardParams& p, const Executor& executor) : p_(p), executor_(executor) {
    const std::int64_t heads = p.batch * p.heads_v, most = larger<std::int64_t>(p.value_dim / kLeastColumns, 1);
    const std::int64_t slices = heads > 0 ? smaller((executor.threads + heads - 1) / heads, most) : 1;
    lanes_ = round_up((p.value_dim + slices - 1) / slices, kLanes<Sum>);
    slices_ = (p.value_dim + lanes_ - 1) / lanes_;
  }

  std::int64_t workspace_bytes() const { return executor_.threads * Buffers(*this, nullptr).bytes; }

  void run(char* workspace) const {
    for_each_unit(executor_, p_.batch * p_.heads_v * slices_, workspace, Buffers(*this, nullptr).bytes,
                  [&](std::int64_t unit, char* memory) {
                    const std::int64_t head = unit / slices_, first = unit % slices_ * lanes_;
                    const ValueColumns columns{first, smaller(lanes_, p_.value_dim - first), lanes_};
                    Buffers b(*this, memory);
                    visit(head / p_.heads_v, head % p_.heads_v, columns, b);
                  });
  }

 private:
  struct Buffers {
    Chunk chunk;
    Sum* state;
    std::int64_t bytes;

    Buffers(const DeltaRuleForward& f, char* memory) : Buffers(f, Arena(memory)) {}

   private:
    Buffers(const DeltaRuleForward& f, Arena arena)
        : chunk(f.p_, f.lanes_, arena), state(arena.take<Sum>(f.p_.key_dim * f.lanes_)), bytes(arena.used()) {}
  };

  void visit(std::int64_t batch, std::int64_t head, ValueColumns columns, Buffers& b) const {
    Chunk& c = b.chunk;
    if (p_.length > 0 && p_.length <= kFewTokens && !p_.carry.data)
      return DeltaRuleSteps<Input>(p_, batch, head, columns).run(c.keys);
    c.load_state(p_.initial_state, batch, head, columns, b.state);
    for (std::int64_t first = 0; first < p_.length; first += kChunk) {
      c.begin(batch, head / c.group, first, true);
      c.set_gates(batch, head, first);
      const bool is_zero = first == 0 && !p_.initial_state.data;
      c.find_differences(batch, head, first, columns, is_zero ? nullptr : b.state, true);
      c.scale_rows(c.differences, lanes_, c.gates->beta, Sum(1), c.differences);
      for (std::int64_t i = 0; i < c.count * kChunk; ++i) c.of_queries[i] *= Sum(p_.scale) * c.decays[i];
      multiply_lower(c.of_queries, kChunk, c.differences, lanes_, c.outputs, c.count, true);
      c.store_tokens(c.outputs, p_.output, batch, head, first, columns);
      c.advance(c.differences, b.state);
    }
    c.store_state(b.state, p_.state, batch, head, columns);
  }

  const DeltaRuleForwardParams& p_;
  const Executor& executor_;
  std::int64_t slices_, lanes_;  // of the columns of a head
};

}  // namespace attnx::cpu::ATTNX_ISA
