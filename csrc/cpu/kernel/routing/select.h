// Balanced clusters: of each centroid the rows with the largest products.
//
// Rows stream by, each met by many centroids at once. A centroid keeps a list of candidates, which a row joins where
// its product is above the lowest that can still be among the best; a full list of twice the cluster's size is cut to
// its best half, which raises that bound. Lists stay in the order of the rows, so what is cut and what remains of equal
// products is decided by their order alone, and the clusters come out sorted.
#pragma once

#include "products.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class Select {
  using Products = RoutingProducts<Input>;
  using Sum = typename Products::Sum;
  using Rank = MaskInt<Sum>;
  static constexpr auto kLowest = Rank(std::uint64_t(1) << (8 * sizeof(Rank) - 1));  // NaN's

 public:
  Select(const SelectParams& p, const Executor& executor) : p_(p), executor_(executor) {
    // Lanes of a unit: all centroids of a head for a sequence, or as few as it takes to have work for all threads.
    const std::int64_t all = larger<std::int64_t>(p.batch * p.heads * p.sequences.count, 1);
    const std::int64_t parts = (2 * executor.threads + all - 1) / all;
    lanes_ = round_up((p.clusters + parts - 1) / parts, kLanes<Sum>);
    blocks_ = (p.clusters + lanes_ - 1) / lanes_;
  }

  std::int64_t workspace_bytes() const { return executor_.threads * Memory(*this, nullptr).bytes; }

  void run(char* workspace) const {
    for_each_unit(executor_, p_.batch * p_.heads * p_.sequences.count * blocks_, workspace,
                  Memory(*this, nullptr).bytes, [&](std::int64_t unit, char* memory) {
                    select(unit / blocks_, unit % blocks_ * lanes_, Memory(*this, memory));
                  });
  }

 private:
  struct Memory {
    Products products;
    Rank *ranks, *bounds;  // [lanes][capacity], [lanes]
    std::int32_t *rows, *counts;
    std::int64_t bytes;

    Memory(const Select& f, char* block) : Memory(f, Arena(block)) {}
    Memory(const Select& f, Arena arena)
        : products(f.p_, f.lanes_, arena),
          ranks(arena.take<Rank>(f.lanes_ * f.capacity())),
          bounds(arena.take<Rank>(f.lanes_)),
          rows(arena.take<std::int32_t>(f.lanes_ * f.capacity())),
          counts(arena.take<std::int32_t>(f.lanes_)),
          bytes(arena.used()) {}
  };

  std::int64_t capacity() const { return smaller(2 * p_.cluster_size, p_.length); }

  // It goes through the rows of a sequence of a head; `all` counts the sequences of all heads.
  void select(std::int64_t all, std::int64_t first, const Memory& m) const {
    const std::int64_t sequences = p_.sequences.count, head = all / sequences % p_.heads;
    const std::int64_t batch = all / sequences / p_.heads, sequence = batch * sequences + all % sequences;
    const std::int64_t begin = p_.sequences.starts ? p_.sequences.starts[sequence] : 0;
    const std::int64_t end = p_.sequences.ends ? p_.sequences.ends[sequence] : p_.length;
    const std::int64_t count = smaller(lanes_, p_.clusters - first), capacity = this->capacity();
    m.products.set(head, first, count);
    for (std::int64_t c = 0; c < lanes_; ++c) {
      m.bounds[c] = c < count ? kLowest : Rank(~kLowest);  // nothing is above the highest
      m.counts[c] = 0;
    }
    m.products.for_each(batch, head, begin, end, [&](std::int64_t row, const Sum* products) {
      for (std::int64_t lane = 0; lane < lanes_; lane += kLanes<Sum>) {
        const Mask<Sum> ranks = rank<Sum>(load(products + lane));
        for (unsigned above = bits(Mask<Sum>(ranks > load(m.bounds + lane))); above; above &= above - 1) {
          const int i = __builtin_ctz(above);
          const std::int64_t c = lane + i, place = c * capacity + m.counts[c];
          m.ranks[place] = ranks[i];
          m.rows[place] = std::int32_t(row);
          // The last row needs no room behind it.
          if (++m.counts[c] == capacity && row + 1 < end) cut(m, c);
        }
      }
    });
    for (std::int64_t c = 0; c < count; ++c) {
      if (m.counts[c] > p_.cluster_size) cut(m, c);
      const std::int64_t cluster = all * p_.clusters + first + c;
      p_.counts[cluster] = m.counts[c];
      __builtin_memcpy(p_.indices + cluster * p_.cluster_size, m.rows + c * capacity,
                       std::size_t(m.counts[c]) * sizeof *m.rows);
    }
  }

  // Leaves the cluster_size best candidates, of equals the first.
  void cut(const Memory& m, std::int64_t c) const {
    const std::int64_t n = m.counts[c];
    Rank* const ranks = m.ranks + c * capacity();
    std::int32_t* const rows = m.rows + c * capacity();
    const auto at_least = [&](Rank bound) {
      std::int32_t all = 0;
      for (std::int64_t i = 0; i < n; ++i) all += ranks[i] >= bound;
      return all;
    };
    // The highest rank that cluster_size candidates reach, by bisection of the integers.
    using Unsigned = decltype(sizeof(Rank) == 4 ? std::uint32_t() : std::uint64_t());
    Rank low = m.bounds[c], high = ranks[0];
    for (std::int64_t i = 1; i < n; ++i) high = larger(high, ranks[i]);
    while (low < high) {
      const auto middle = Rank(Unsigned(low) + (Unsigned(high) - Unsigned(low) - 1) / 2 + 1);
      if (at_least(middle) >= p_.cluster_size) {
        low = middle;
      } else {
        high = Rank(middle - 1);
      }
    }
    std::int64_t equals = p_.cluster_size - (low < Rank(~kLowest) ? at_least(Rank(low + 1)) : 0), kept = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      if (ranks[i] < low || (ranks[i] == low && equals-- <= 0)) continue;
      ranks[kept] = ranks[i];
      rows[kept++] = rows[i];
    }
    m.counts[c] = std::int32_t(kept);
    m.bounds[c] = low;
  }

  const SelectParams& p_;
  const Executor& executor_;
  std::int64_t lanes_, blocks_;
};

}  // namespace attnx::cpu::ATTNX_ISA
