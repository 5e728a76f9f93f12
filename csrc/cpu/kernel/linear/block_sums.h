// One matrix per block, and for each row of blocks the sum of those in its scope.
//
// A scope is most blocks or few of them, and with a causal mask only those of a prefix. Its sum starts from the sum of
// a whole prefix, kept for every kGroup-th block, less the blocks outside the scope; or from nothing, plus those
// inside: whichever takes fewer blocks. So many blocks never cost a sum over all of them, and a difference is never
// taken between sums that are much larger than it.
#pragma once

#include "../simd.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Sum>
class BlockSums {
 public:
  // Sums go through memory in slices that stay in registers, while those of all blocks stay in the cache.
  static constexpr std::int64_t kVectors = 8, kSlice = kVectors * kLanes<Sum>;

  // For `blocks` matrices of `elements` numbers; null memory only counts.
  BlockSums(Sum* memory, std::int64_t blocks, std::int64_t elements)
      : memory_(memory), blocks_(blocks), size_(round_up(elements, kSlice)) {}

  std::int64_t blocks() const { return blocks_; }
  std::int64_t size() const { return size_; }  // from one matrix to the next
  std::int64_t slices() const { return size_ / kSlice; }
  std::int64_t total() const { return (blocks_ + blocks_ / kGroup + 1) * size_; }
  Sum* block(std::int64_t i) const { return memory_ + i * size_; }

  // Once all blocks stand: adds up the prefixes, one slice of them.
  void add_up(std::int64_t slice) const {
    Vec<Sum> sum[kVectors] = {};
    for (std::int64_t i = 0;; ++i) {
      if (i % kGroup == 0) put(prefix(i / kGroup), slice, sum);
      if (i == blocks_) return;
      const Sum* from = block(i) + slice * kSlice;
      for (int v = 0; v < kVectors; ++v) sum[v] += load(from + v * kLanes<Sum>);
    }
  }

  // The matrices that make up a sum: rows[0 .. added) less rows[added .. added + subtracted).
  struct Terms {
    std::int32_t* rows;  // room for all blocks and one more
    std::int64_t added, subtracted;
  };

  // Of the blocks below `visible` that are in scope.
  template <class InScope>
  void choose(std::int64_t visible, InScope in_scope, Terms& terms) const {
    const std::int64_t whole = visible / kGroup * kGroup;
    std::int64_t inside = 0;
    for (std::int64_t i = 0; i < whole; ++i) inside += in_scope(i);
    const bool from_prefix = 1 + whole - inside < inside;
    terms.added = terms.subtracted = 0;
    if (from_prefix) terms.rows[terms.added++] = std::int32_t(blocks_ + whole / kGroup);
    for (std::int64_t i = from_prefix ? whole : 0; i < visible; ++i)
      if (in_scope(i)) terms.rows[terms.added++] = std::int32_t(i);
    if (!from_prefix) return;
    for (std::int64_t i = 0; i < whole; ++i)
      if (!in_scope(i)) terms.rows[terms.added + terms.subtracted++] = std::int32_t(i);
  }

  // Writes the sums of several terms, or adds them to what is there, `size()` apart.
  void sum(const Terms* terms, std::int64_t count, Sum* to, bool accumulate) const {
    for (std::int64_t slice = 0; slice < slices(); ++slice) {
      for (std::int64_t n = 0; n < count; ++n) {
        const Terms& t = terms[n];
        Vec<Sum> sum[kVectors];
        for (int v = 0; v < kVectors; ++v)
          sum[v] = accumulate ? load(to + n * size_ + slice * kSlice + v * kLanes<Sum>) : Vec<Sum>{};
        for (std::int64_t i = 0; i < t.added; ++i) {
          const Sum* from = memory_ + t.rows[i] * size_ + slice * kSlice;
          for (int v = 0; v < kVectors; ++v) sum[v] += load(from + v * kLanes<Sum>);
        }
        for (std::int64_t i = t.added; i < t.added + t.subtracted; ++i) {
          const Sum* from = memory_ + t.rows[i] * size_ + slice * kSlice;
          for (int v = 0; v < kVectors; ++v) sum[v] -= load(from + v * kLanes<Sum>);
        }
        put(to + n * size_, slice, sum);
      }
    }
  }

 private:
  static constexpr std::int64_t kGroup = 16;

  // The sum of the first i kGroup blocks.
  Sum* prefix(std::int64_t i) const { return block(blocks_ + i); }
  static void put(Sum* to, std::int64_t slice, const Vec<Sum> (&sum)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) store(to + slice * kSlice + v * kLanes<Sum>, sum[v]);
  }

  Sum* memory_;
  std::int64_t blocks_, size_;
};

}  // namespace attnx::cpu::ATTNX_ISA
