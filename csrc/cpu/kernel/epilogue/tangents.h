// A row leaves its output, its logsumexp, and the tangents of both.
#pragma once

#include "attnx/jvp_params.h"
#include "output.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Sum>
struct TangentRows {
  using Params = JvpParams;

  template <class Output>
  struct Row {
    Output *output, *tangent_output;
    Sum *logsumexp, *tangent_logsumexp;
  };

  template <class Output>
  static Row<Output> of(const Params& p, std::int64_t batch, std::int64_t head, std::int64_t row) {
    return {row_of<Output>(p.output, batch, head, row), row_of<Output>(p.tangent_output, batch, head, row),
            row_of<Sum>(p.logsumexp, batch, head, row), row_of<Sum>(p.tangent_logsumexp, batch, head, row)};
  }
  static std::int64_t numbers(const Params& p) { return 2 * (p.value_dim + 1); }
  static Row<Sum> of_part(const Params& p, Sum* numbers) {
    Sum* const logsumexp = numbers + 2 * p.value_dim;
    return {numbers, numbers + p.value_dim, logsumexp, logsumexp + 1};
  }

  // The output is the sum of s_i O_i over the parts, with s_i their shares. So its tangent is that of
  // s_i (dO_i + (dL_i - dL) O_i), as the share exp(L_i - L) of a part changes by s_i (dL_i - dL) with the logsumexp.
  template <class Score, class Output, class Part>
  static void merge(const Params& p, std::int64_t parts, const Part& part, const Row<Output>& to) {
    const PartShares<Score, Sum> shares(parts, [&](std::int64_t i) { return *part(i).logsumexp; });
    Sum total = 1, tangent_logsumexp = 0;
    if constexpr (Score::kNormalised) {
      total = 0;
      for (std::int64_t i = 0; i < parts; ++i) {
        const Sum share = shares.of(*part(i).logsumexp);
        total += share;
        tangent_logsumexp += share * *part(i).tangent_logsumexp;
      }
      tangent_logsumexp = total == 0 ? 0 : tangent_logsumexp / total;
      *to.logsumexp = shares.logsumexp(total);
      *to.tangent_logsumexp = tangent_logsumexp;
    }
    Sum output[kMaxHeadDim] = {}, tangent[kMaxHeadDim] = {};
    for (std::int64_t i = 0; i < parts; ++i) {
      const Row<Sum> from = part(i);
      Sum share = 1, moves = 0;
      if constexpr (Score::kNormalised) {
        share = total == 0 ? 0 : shares.of(*from.logsumexp) / total;
        moves = p.moves_logits() ? *from.tangent_logsumexp - tangent_logsumexp : 0;
      }
      for (std::int64_t d = 0; d < p.value_dim; ++d) {
        output[d] += share * from.output[d];
        tangent[d] += share * (moves == 0 ? from.tangent_output[d] : from.tangent_output[d] + moves * from.output[d]);
      }
    }
    convert_row(to.output, output, p.value_dim);
    convert_row(to.tangent_output, tangent, p.value_dim);
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
