// A row leaves its output and, where the score is normalised, its logsumexp.
#pragma once

#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

// These are the shares of the parts of a row's keys in the whole: for softmax, of the sum of weights; for a score that
// is not normalised, 1 each.
template <class Score, class Sum>
class PartShares {
  static constexpr Sum kInfinity = __builtin_huge_valf();

 public:
  // logsumexp(part) is that of one of the parts.
  template <class Logsumexp>
  PartShares(std::int64_t parts, const Logsumexp& logsumexp) {
    if constexpr (Score::kNormalised) {
      for (std::int64_t part = 0; part < parts; ++part) {
        // Not NaN itself: a NaN shows in the sum.
        if (logsumexp(part) > highest_) highest_ = logsumexp(part);
      }
    }
  }

  Sum of(Sum logsumexp) const {
    if constexpr (!Score::kNormalised) return 1;
    return Sum(__builtin_exp(logsumexp - (highest_ == -kInfinity ? 0 : highest_)));
  }
  // This is the logsumexp of the whole, from the sum of all shares.
  Sum logsumexp(Sum total) const { return total == 0 ? highest_ : highest_ + Sum(__builtin_log(total)); }

 private:
  Sum highest_ = -kInfinity;
};

template <class Sum>
struct OutputRows {
  using Params = ForwardParams;

  template <class Output>
  struct Row {
    Output* output;
    Sum* logsumexp;
  };

  // These say where a row of the results lies, and where one of a part of the keys does, among so many numbers.
  template <class Output>
  static Row<Output> of(const Params& p, std::int64_t batch, std::int64_t head, std::int64_t row) {
    return {row_of<Output>(p.output, batch, head, row), row_of<Sum>(p.logsumexp, batch, head, row)};
  }
  static std::int64_t numbers(const Params& p) { return p.value_dim + 1; }
  static Row<Sum> of_part(const Params& p, Sum* numbers) { return {numbers, numbers + p.value_dim}; }

  // Softmax: the means of the parts, weighed by their shares of the sum. Sigmoid: the sum. part(i) is a row of one.
  template <class Score, class Output, class Part>
  static void merge(const Params& p, std::int64_t parts, const Part& part, const Row<Output>& to) {
    const PartShares<Score, Sum> shares(parts, [&](std::int64_t i) { return *part(i).logsumexp; });
    Sum output[kMaxHeadDim] = {}, total = 0;
    for (std::int64_t i = 0; i < parts; ++i) {
      const Row<Sum> from = part(i);
      const Sum share = shares.of(*from.logsumexp);
      total += share;
      for (std::int64_t d = 0; d < p.value_dim; ++d) output[d] += share * from.output[d];
    }
    if constexpr (Score::kNormalised) {
      for (std::int64_t d = 0; d < p.value_dim; ++d) output[d] = total == 0 ? 0 : output[d] / total;
      *to.logsumexp = shares.logsumexp(total);
    }
    convert_row(to.output, output, p.value_dim);
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
