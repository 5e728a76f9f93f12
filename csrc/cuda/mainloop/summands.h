// These say what the loop over sums makes of a logit before a reduction takes it. The logit comes with its row's
// offset, times log2(e).
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/mainloop/row_numbers.h"

namespace attnx::cuda {

// This is dS, the gradient of a logit. The row's other number is its delta.
struct GradLogits {
  // The loop also computes dP = dO V^T.
  static constexpr bool kHasGradient = true;
  // The row's other number is a factor of what is summed.
  static constexpr bool kHasFactor = false;

  template <class Score>
  using Rows = RowsOfBackward;
  template <class Score>
  using Head = HeadOfBackward;

  template <class Score, class Input>
  static __device__ __forceinline__ float of(const Rows<Score>&, float logit, float grad_weight, float delta) {
    float factor;
    Score::template Backward<Input>::weight(logit, factor);
    return factor * (Score::kNormalised ? grad_weight - delta : grad_weight);
  }
};

// This is dS too, or the gradient of the factor of a weight, key_mask.
struct GradTerms {
  static constexpr bool kHasGradient = true, kHasFactor = false;

  template <class Score>
  using Rows = RowsOfTerms;
  template <class Score>
  using Head = HeadOfBackward;

  template <class Score, class Input>
  static __device__ __forceinline__ float of(const Rows<Score>& rows, float logit, float grad_weight, float delta) {
    using Policy = typename Score::template Backward<Input>;
    float factor;
    // A logit that leaves key_mask out may be larger than the row's logsumexp by any number.
    const float weight = Policy::weight(min_keeping_nan(logit, 127), factor);
    if constexpr (Score::kNormalised) return factor * (grad_weight - delta);
    return (rows.of_factors ? weight * (1 / Policy::kWeightScale) : factor) * grad_weight;
  }
};

// This is w D, of which a sharpened row needs the sum before its first gradient.
struct SharpenedProducts {
  static constexpr bool kHasGradient = true, kHasFactor = false;

  template <class Score>
  using Rows = RowsOfSharpened;
  template <class Score>
  using Head = HeadOfSharpened;

  template <class Score, class Input>
  static __device__ __forceinline__ float of(const Rows<Score>&, float logit, float grad_weight,
                                             const HeadOfSharpened::Numbers& x) {
    using Policy = typename Score::template Backward<Input>;
    float v, slope;
    return Policy::lower_power(logit, typename Policy::Row(x.row, 1), v, slope) * (grad_weight - x.delta);
  }
};

// This is P, the weight. The row's other number is what it counts.
struct Weights {
  static constexpr bool kHasGradient = false, kHasFactor = true;

  template <class Score>
  using Rows = RowsOfWeights<Score>;
  template <class Score>
  using Head = HeadOfWeights<Score>;

  template <class Score, class Input>
  static __device__ __forceinline__ float of(const Rows<Score>&, float logit, float, float) {
    using Policy = typename Score::template Backward<Input>;
    float factor;
    return Policy::weight(logit, factor) * (1 / Policy::kWeightScale);
  }
};

// This is the logit itself, times log2(e).
struct Logits {
  static constexpr bool kHasGradient = false, kHasFactor = false;

  template <class Score>
  using Rows = PlainRows;
  template <class Score>
  using Head = HeadOfPlainRows;

  template <class Score, class Input>
  static __device__ __forceinline__ float of(const Rows<Score>&, float logit, float, float) {
    return logit;
  }
};

}  // namespace attnx::cuda
