// This takes the means of ranges of rows, and how far the rows are from them on average.
#pragma once

#include "arena.h"
#include "arithmetic.h"
#include "attnx/range_means_params.h"
#include "convert.h"
#include "rows.h"
#include "units.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class RangeMeans {
  using Sum = typename Arithmetic<Input>::Sum;

 public:
  RangeMeans(const RangeMeansParams& p, const Executor& executor) : p_(p), executor_(executor) {}

  std::int64_t workspace_bytes() const { return executor_.threads * Memory(*this, nullptr).bytes; }

  void run(char* workspace) const {
    for_each_unit(executor_, p_.batch * p_.heads * p_.count, workspace, Memory(*this, nullptr).bytes,
                  [&](std::int64_t unit, char* memory) { pool(unit, Memory(*this, memory)); });
  }

 private:
  static constexpr std::int64_t kBlock = 64;  // so many rows are summed before their sum joins those of others

  struct Memory {
    Sum *row, *sums;
    double* totals;  // long sums of float32 would lose what sums of a few rows have
    std::int64_t bytes;

    Memory(const RangeMeans& f, char* block) : Memory(f, Arena(block)) {}
    Memory(const RangeMeans& f, Arena arena)
        : row(arena.take<Sum>(f.p_.dim)),
          sums(arena.take<Sum>(f.p_.dim)),
          totals(arena.take<double>(f.p_.dim)),
          bytes(arena.used()) {}
  };

  void pool(std::int64_t unit, const Memory& memory) const {
    const std::int64_t range = unit % p_.count, head = unit / p_.count % p_.heads, batch = unit / p_.count / p_.heads;
    std::int64_t first = range * p_.block, last = smaller(first + p_.block, p_.length);
    if (p_.ranges) {
      const std::int32_t* const pair = p_.ranges + batch * p_.ranges_batch_stride + 2 * range;
      first = pair[0];
      last = pair[1];
    }
    const auto* const rows = static_cast<const Input*>(p_.rows.data) + batch * p_.rows.batch_stride +
                             head * p_.rows.head_stride + first * p_.rows.row_stride;
    Sum* const means = static_cast<Sum*>(p_.means) + unit * p_.dim;
    average(rows, last - first, memory, means, [](Sum x, std::int64_t) { return x; });
    if (!p_.deviations) return;
    Sum* const deviations = static_cast<Sum*>(p_.deviations) + unit * p_.dim;
    average(rows, last - first, memory, deviations, [=](Sum x, std::int64_t d) {
      const Sum off = x - means[d];
      return off < 0 ? -off : off;
    });
  }

  // It writes the mean over the rows of term(number, its feature).
  template <class Term>
  void average(const Input* rows, std::int64_t count, const Memory& memory, Sum* to, const Term& term) const {
    const std::int64_t dim = p_.dim;
    Sum* const __restrict row = memory.row;
    Sum* const __restrict sums = memory.sums;
    double* const __restrict totals = memory.totals;
    set_zero(totals, dim);
    for (std::int64_t first = 0; first < count; first += kBlock) {
      set_zero(sums, dim);
      for (std::int64_t i = first; i < smaller(first + kBlock, count); ++i) {
        convert_row(row, rows + i * p_.rows.row_stride, dim);
        for (std::int64_t d = 0; d < dim; ++d) sums[d] += term(row[d], d);
      }
      for (std::int64_t d = 0; d < dim; ++d) totals[d] += double(sums[d]);
    }
    const double rows_or_one = count > 0 ? double(count) : 1;
    for (std::int64_t d = 0; d < dim; ++d) to[d] = Sum(totals[d] / rows_or_one);
  }

  const RangeMeansParams& p_;
  const Executor& executor_;
};

}  // namespace attnx::cpu::ATTNX_ISA
