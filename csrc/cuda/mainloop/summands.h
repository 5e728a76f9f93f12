// These say what the loop over sums makes of a logit before a reduction adds it up. The logit comes with its row's
// offset, times log2(e).
#pragma once

namespace attnx::cuda {

// This is dS, the gradient of a logit. The row's other number is its delta.
struct GradLogits {
  // The loop also computes dP = dO V^T.
  static constexpr bool kHasGradient = true;

  template <class Score, class Input>
  static __device__ __forceinline__ float of(float logit, float grad_weight, float delta) {
    float factor;
    Score::template Backward<Input>::weight(logit, factor);
    return factor * (Score::kNormalised ? grad_weight - delta : grad_weight);
  }
};

}  // namespace attnx::cuda
