// This is the pass before the backward of one score.
#pragma once

#include "cuda/common/element.h"
#include "cuda/passes/row_terms.h"
#include "cuda/units/call.h"

namespace attnx::cuda {

template <class Score>
struct RowTerms {
  static void run(const BackwardCall& call) {
    const auto& p = call.params;
    const auto launch = [&](auto* kernel) {
      const RowTermsArguments<Score> args{call.geometry,       p.output,           p.grad_output,
                                          p.logsumexp,         p.grad_logsumexp,   Score::parameters(p),
                                          call.scratch.offset, call.scratch.delta, call.scratch.sharpened,
                                          call.rows_of_tile};
      launch_kernel("attnx_row_terms", kernel, args.batch * args.heads.divisor() * args.query_blocks.divisor(), 256, 0,
                    call.stream, args);
    };
    const bool aligned = call.variant.aligned;
    if constexpr (!Score::kNormalised) {
      launch(attnx_row_terms<Score, __half, true>);  // it reads no input
    } else if (p.dtype == DType::kBFloat16) {
      launch(aligned ? attnx_row_terms<Score, __nv_bfloat16, true> : attnx_row_terms<Score, __nv_bfloat16, false>);
    } else {
      launch(aligned ? attnx_row_terms<Score, __half, true> : attnx_row_terms<Score, __half, false>);
    }
  }
};

}  // namespace attnx::cuda
