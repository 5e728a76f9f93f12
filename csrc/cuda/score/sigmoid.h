// The sigmoid score: each weight on its own, without row maximum, row sum or rescaling.
#pragma once

#include "cuda/arguments.h"
#include "cuda/score/weights.h"

namespace attnx::cuda {

// What a row adds to its logits, times log2(e).
template <class Args>
__device__ __forceinline__ float sigmoid_bias_log2(const Args& args, const Band& band, int head, int query) {
  float bias = float(args.call.bias_value) + of_head(args.call.bias, head);
  if (args.call.bias_rule == BiasRule::kLength) bias -= logf(float(max(band.length_k, 1)));
  if (args.call.bias_rule == BiasRule::kRow) {
    const Visible visible = band.visible(query);
    bias -= logf(float(max(visible.end - visible.first, 1)));
  }
  return bias * kLog2E;
}

// Of a thread's kRows rows in the forward.
template <class Input_, class Formula, int kRows>
class SigmoidForward {
  float negative_bias_[kRows];
  float offset_[kRows];
  float multiplier_;

 public:
  using Input = Input_;

  // The thread's row of this number is this query of this query head.
  template <class Args>
  __device__ __forceinline__ void set_row(int row, const Args& args, const Band& band, int head, int query) {
    negative_bias_[row] = -sigmoid_bias_log2(args, band, head, query);
  }

  // Starts a tile: a logit is s * multiplier + bias, times log2(e).
  template <bool kHasBias, int kM, int kN, int kD>
  __device__ __forceinline__ void begin(const float (&)[kM][kN][4], float (&)[kM][kD][4], float multiplier,
                                        float bias) {
    multiplier_ = -multiplier;
#pragma unroll
    for (int r = 0; r < kRows; ++r) offset_[r] = kHasBias ? negative_bias_[r] - bias : negative_bias_[r];
  }

  __device__ __forceinline__ float weight(float s, int row) {
    return Formula::template weight<Input>(fmaf(s, multiplier_, offset_[row]));
  }

  // What the row's sums are multiplied with in the end.
  __device__ __forceinline__ float finish(int) { return 1 / Formula::template kScale<Input>; }
  __device__ __forceinline__ float logsumexp(int) const { return 0; }
};

// In the backward, from a logit with its row's offset, times log2(e).
template <class Input>
struct SigmoidBackward {
  static constexpr float kWeightScale = cuda::kWeightScale<Input>;
  static constexpr bool kHasDelta = false;

  // The weight times kWeightScale, and what the gradient of the weight is multiplied with.
  static __device__ __forceinline__ float weight(float logit, float& factor) {
    return ExactSigmoid::weight_and_derivative(-logit, factor) * kWeightScale;
  }
};

}  // namespace attnx::cuda
