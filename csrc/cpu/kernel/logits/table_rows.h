// Rows of numbers of which a pair takes one by its distance. Neighbours among keys, or among queries, mostly take
// neighbouring numbers of a row, or all the same one; a vector of them is then one load, or one number.
#pragma once

#include "../arena.h"
#include "../rows.h"
#include "attnx/params.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Sum>
class TableRows {
  // What a vector of numbers is whose places in the index ascend from one on.
  enum class Run : std::uint8_t { kNone, kAscending, kConstant };
  static constexpr int kCount = kLanes<Sum>;

 public:
  TableRows(const AttentionParams& p, Arena& arena)
      : tables_(p.terms.tables), zero_(p.length_k - 1), count_(tables_.index ? p.length_q + p.length_k - 1 : 0) {
    runs_ = arena.take<Run>(count_);
  }

  bool any() const { return tables_.index; }

  // The runs are found when a worker has its first tile.
  void prepare() {
    if (prepared_ || !any()) return;
    prepared_ = true;
    for (std::int64_t place = 0; place + kCount <= count_; ++place) {
      bool ascending = true, constant = true;
      for (int i = 1; i < kCount; ++i) {
        ascending &= tables_.index[place + i] == tables_.index[place] + i;
        constant &= tables_.index[place + i] == tables_.index[place];
      }
      runs_[place] = ascending ? Run::kAscending : constant ? Run::kConstant : Run::kNone;
    }
  }

  std::int64_t number(std::int64_t query, std::int64_t key) const { return tables_.index[query - key + zero_]; }

  // The numbers of a row for the queries from one on and a key.
  ATTNX_INLINE Vec<Sum> of_queries(const Sum* row, std::int64_t query, std::int64_t key) const {
    return ascending(row, query - key + zero_);
  }
  // The same for a query and the keys from one on.
  ATTNX_INLINE Vec<Sum> of_keys(const Sum* row, std::int64_t query, std::int64_t key) const {
    return reversed<Sum>(ascending(row, query - key + zero_ - (kCount - 1)));
  }
  ATTNX_INLINE void add_of_queries(Sum* row, std::int64_t query, std::int64_t key, Vec<Sum> x) const {
    add(row, query - key + zero_, x);
  }
  ATTNX_INLINE void add_of_keys(Sum* row, std::int64_t query, std::int64_t key, Vec<Sum> x) const {
    add(row, query - key + zero_ - (kCount - 1), reversed<Sum>(x));
  }

 private:
  ATTNX_INLINE Vec<Sum> ascending(const Sum* row, std::int64_t place) const {
    const std::int32_t* const index = tables_.index + place;
    const Run run = runs_[place];
    if (run == Run::kAscending) return load(row + index[0]);
    if (run == Run::kConstant) return splat(row[index[0]]);
    return gathered(row, index);
  }
  // This has code of its own, as do the sums below, because each vector of a tile would have a copy.
  __attribute__((noinline)) static Vec<Sum> gathered(const Sum* row, const std::int32_t* index) {
    Vec<Sum> x{};
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) x[i] = row[index[i]];
    return x;
  }
  __attribute__((noinline)) void add(Sum* row, std::int64_t place, Vec<Sum> x) const {
    const std::int32_t* const index = tables_.index + place;
    const Run run = runs_[place];
    if (run == Run::kAscending) return store(row + index[0], load(row + index[0]) + x);
    if (run == Run::kConstant) {
      row[index[0]] += sum_of_lanes<Sum>(x);
      return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) row[index[i]] += x[i];
  }

  const DistanceTables& tables_;
  std::int64_t zero_, count_;  // the place of distance 0, and how many there are
  Run* runs_;
  bool prepared_ = false;
};

}  // namespace attnx::cpu::ATTNX_ISA
