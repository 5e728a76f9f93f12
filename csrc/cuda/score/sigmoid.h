// This is the sigmoid score: it makes each weight on its own, without row maximum, row sum or rescaling.
#pragma once

#include <type_traits>

#include "cuda/common/sequence.h"
#include "cuda/common/tile.h"
#include "cuda/score/sigmoid_formulas.h"

namespace attnx::cuda {

// This has a thread's kRows rows in the forward.
template <class Input_, class Formula, int kRows>
class SigmoidForward {
  float negative_bias_[kRows];
  float offset_[kRows];
  float multiplier_;
  float divisor_ = 1;  // of the sums so far

 public:
  using Input = Input_;

  // The thread's row of this number is this query of this query head, of which the block has this share of the keys.
  template <class Parameters, class Band>
  __device__ __forceinline__ void set_row(int row, const Parameters& parameters, const Band& band, int head, int query,
                                          int) {
    negative_bias_[row] = -parameters.row_bias_log2(band, head, query);
  }

  // This starts a tile: a logit is s * multiplier + bias, times log2(e), and its weights count divided. The sums are
  // brought to the tile's divisor rather than the weights, whose dtype has little range.
  template <bool kHasBias, int kM, int kN, int kD>
  __device__ __forceinline__ void begin(const float (&)[kM][kN][4], float (&o)[kM][kD][4], float multiplier, float bias,
                                        float divisor) {
    if (kHasBias && divisor != divisor_) {
      scale(o, divisor / divisor_);
      divisor_ = divisor;
    }
    multiplier_ = -multiplier;
#pragma unroll
    for (int r = 0; r < kRows; ++r) offset_[r] = kHasBias ? negative_bias_[r] - bias : negative_bias_[r];
  }

  __device__ __forceinline__ float weight(float s, int row) {
    return Formula::template weight<Input>(fmaf(s, multiplier_, offset_[row]));
  }

  // This sets the weight's derivative by its logit, too, which counts as many times.
  __device__ __forceinline__ float weight(float s, int row, float& derivative) {
    return Formula::template weight<Input>(fmaf(s, multiplier_, offset_[row]), derivative);
  }

  // This returns what the row's sums are multiplied with in the end.
  __device__ __forceinline__ float finish(int) { return 1 / (Formula::template kScale<Input> * divisor_); }
  __device__ __forceinline__ float logsumexp(int) const { return 0; }
};

// This is the score policy.
struct Sigmoid {
  static constexpr bool kNormalised = false, kBandOnly = false;

  struct Parameters {
    BiasRule rule;
    float value;
    PerHead bias;

    // This returns what a row adds to its logits, times log2(e).
    template <class Band>
    __device__ __forceinline__ float row_bias_log2(const Band& band, int head, int query) const {
      float x = value + of_head(bias, head);
      if (rule == BiasRule::kLength) x -= logf(float(max(band.length_k, 1)));
      if (rule == BiasRule::kRow) {
        const Visible visible = band.visible(query);
        x -= logf(float(max(visible.end - visible.first, 1)));
      }
      return x * kLog2E;
    }
  };
  static Parameters parameters(const AttentionParams& p) { return {p.bias_rule, float(p.bias_value), p.bias}; }

  template <class Input, class Tile, int kRows>
  using Forward =
      SigmoidForward<Input, std::conditional_t<Tile::kSparesSpecialFunctions, NewtonSigmoid, ExactSigmoid>, kRows>;

  template <class Input, int kRows>
  using ForwardAlong = SigmoidForward<Input, SigmoidWithDerivative, kRows>;

  // The backward sees a logit with its row's offset, its bias, times log2(e).
  template <class Input>
  struct Backward {
    static constexpr bool kHasRows = false;
    static constexpr float kWeightScale = cuda::kWeightScale<Input>;

    // This returns the weight times kWeightScale, and sets what the gradient of the weight is multiplied with.
    static __device__ __forceinline__ float weight(float logit, float& factor) {
      return ExactSigmoid::weight_and_derivative(-logit, factor) * kWeightScale;
    }
  };
};

}  // namespace attnx::cuda
