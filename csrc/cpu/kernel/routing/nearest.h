// Ragged clusters: of each row the centroid with the largest product; and what the centroids follow, the sums of the
// rows that are nearest to them.
#pragma once

#include "products.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class Nearest {
  using Products = RoutingProducts<Input>;
  using Sum = typename Products::Sum;
  using Rank = MaskInt<Sum>;

 public:
  Nearest(const NearestParams& p, const Executor& executor) : p_(p), executor_(executor) {}

  std::int64_t workspace_bytes() const { return executor_.threads * Memory(*this, nullptr).bytes; }

  void run(char* workspace) const {
    const std::int64_t blocks = (p_.length + kBlock - 1) / kBlock;
    for_each_unit(executor_, p_.batch * p_.heads * blocks, workspace, Memory(*this, nullptr).bytes,
                  [&](std::int64_t unit, char* memory) {
                    const std::int64_t all = unit / blocks, first = unit % blocks * kBlock;
                    find(all, first, smaller(first + kBlock, p_.length), Memory(*this, memory).products);
                  });
  }

 private:
  static constexpr std::int64_t kBlock = 1024;  // rows of a unit

  struct Memory {
    Products products;
    std::int64_t bytes;

    Memory(const Nearest& f, char* block) : Memory(f, Arena(block)) {}
    Memory(const Nearest& f, Arena arena) : products(f.p_, f.lanes(), arena), bytes(arena.used()) {}
  };

  std::int64_t lanes() const { return round_up(p_.clusters, kLanes<Sum>); }

  void find(std::int64_t all, std::int64_t first, std::int64_t end, const Products& products) const {
    constexpr auto kLowest = Rank(std::uint64_t(1) << (8 * sizeof(Rank) - 1));  // NaN's
    const std::int64_t head = all % p_.heads;
    products.set(head, 0, p_.clusters);
    Mask<Sum> lane_index;
    for (int i = 0; i < kLanes<Sum>; ++i) lane_index[i] = i;
    products.for_each(all / p_.heads, head, first, end, [&](std::int64_t row, const Sum* x) {
      Mask<Sum> best = Mask<Sum>{} + kLowest, index = Mask<Sum>{} - 1;
      for (std::int64_t lane = 0; lane < p_.clusters; lane += kLanes<Sum>) {
        const Mask<Sum> c = lane_index + Rank(lane);
        const Mask<Sum> better = (rank<Sum>(load(x + lane)) > best) & (c < Rank(p_.clusters));
        best = better ? rank<Sum>(load(x + lane)) : best;
        index = better ? c : index;
      }
      Rank highest = kLowest, nearest = -1;
      for (int i = 0; i < kLanes<Sum>; ++i) {
        if (index[i] < 0 || best[i] < highest || (best[i] == highest && index[i] > nearest)) continue;
        highest = best[i];
        nearest = index[i];
      }
      const std::int64_t sequence = sequence_of(p_.sequences, all / p_.heads, row);
      if (sequence < 0) nearest = -1;
      if (p_.by_sequence && nearest >= 0) nearest += Rank(sequence * p_.clusters);
      p_.nearest[all * p_.length + row] = std::int32_t(nearest);
    });
  }

  const NearestParams& p_;
  const Executor& executor_;
};

// One unit a head: a centroid's rows are added up in their order, whatever the number of threads.
template <class Input>
class CentroidSums {
  using Sum = typename Arithmetic<Input>::Sum;

 public:
  CentroidSums(const CentroidSumsParams& p, const Executor& executor) : p_(p), executor_(executor) {}

  std::int64_t workspace_bytes() const { return 0; }

  void run(char* /*workspace*/) const {
    for_each_unit(executor_, p_.heads, nullptr, 0, [&](std::int64_t head, char*) {
      for (std::int64_t batch = 0; batch < p_.batch; ++batch) {
        const std::int32_t* nearest = p_.nearest + (batch * p_.heads + head) * p_.length;
        for (std::int64_t row = 0; row < p_.length; ++row) {
          if (nearest[row] < 0) continue;
          Sum x[kMaxHeadDim];
          convert_row(x, row_of<const Input>(p_.rows, batch, head / p_.group, row), p_.head_dim);
          normalise(x, p_.head_dim);
          const std::int64_t cluster = head * p_.clusters + nearest[row];
          for (std::int64_t d = 0; d < p_.head_dim; ++d) p_.sums[cluster * p_.head_dim + d] += double(x[d]);
          p_.counts[cluster] += 1;
        }
      }
    });
  }

 private:
  const CentroidSumsParams& p_;
  const Executor& executor_;
};

}  // namespace attnx::cpu::ATTNX_ISA
