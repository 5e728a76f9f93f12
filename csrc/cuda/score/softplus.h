// This is the softplus score, length-scaled softplus attention (arXiv 2501.13428): a weight is softplus(logit) / Z with
// the sum Z of its row. Logits of normalised rows are small, so that there is no maximum to run along and nothing to
// rescale; ln Z stands for the logsumexp.
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/common/reduce.h"
#include "cuda/common/sequence.h"
#include "cuda/mainloop/backward_arguments.h"
#include "cuda/score/sigmoid_formulas.h"

namespace attnx::cuda {

// This returns ln(1 + 2^y), and sets power to 2^-|y|. With e = 2^-|y| it is max(y, 0) ln 2 + e (ln(1 + e) / e), where
// the quotient is a polynomial whose relative error on [0, 1] is 5.7e-5: lg2(1 + e) would lose all of a small e.
__device__ __forceinline__ float softplus_of_log2(float y, float& power) {
  power = exp2_approx(-fabsf(y));
  float quotient = fmaf(power, 0.04134726f, -0.15742712f);
  quotient = fmaf(power, quotient, 0.30630087f);
  quotient = fmaf(power, quotient, -0.49697779f);
  quotient = fmaf(power, quotient, 0.99994328f);
  return fmaf(fmaxf(y, 0), kLn2, power * quotient);
}

// This has a thread's kRows rows in the forward.
template <class Input_, int kRows>
class SoftplusForward {
  float sum_[kRows];  // the thread's part
  float multiplier_;

 public:
  using Input = Input_;

  template <class Parameters>
  __device__ __forceinline__ void set_row(int row, const Parameters&, const Band&, int, int, int) {
    sum_[row] = 0;
  }

  // This starts a tile: a logit is s * multiplier, times log2(e). No list has this score.
  template <bool kHasBias, int kM, int kN, int kD>
  __device__ __forceinline__ void begin(const float (&)[kM][kN][4], float (&)[kM][kD][4], float multiplier, float,
                                        float) {
    static_assert(!kHasBias);
    multiplier_ = multiplier;
  }

  __device__ __forceinline__ float weight(float s, int row) {
    float power;
    const float p = softplus_of_log2(s * multiplier_, power);
    sum_[row] += p;
    return p;
  }

  // This returns what the row's sums are multiplied with in the end. A row that sees no key has sums of 0.
  __device__ __forceinline__ float finish(int row) {
    sum_[row] = sum_of_quad(sum_[row]);
    return sum_[row] == 0 ? 1 : 1 / sum_[row];
  }
  // This is valid after finish(). The logarithm of 0 is -inf, as for a row that sees no key.
  __device__ __forceinline__ float logsumexp(int row) const { return log2f(sum_[row]) * kLn2; }
};

// This is the score policy.
struct Softplus {
  static constexpr bool kNormalised = true, kBandOnly = true;

  struct Parameters {};  // what rows read in the forward
  static Parameters parameters(const AttentionParams&) { return {}; }

  template <class Input, class Tile, int kRows>
  using Forward = SoftplusForward<Input, kRows>;

  // The backward sees a logit, times log2(e), and 1 / Z of its row.
  template <class Input>
  struct Backward {
    static constexpr bool kHasRows = true;
    // Weights near 1 / length would be subnormal in float16.
    static constexpr float kWeightScale = cuda::kWeightScale<Input>;

    using Row = float;
    static __device__ __forceinline__ Row row(const BackwardScratch&, std::int64_t, float offset) {
      return exp2_approx(offset);
    }

    // This returns the weight times kWeightScale, and keeps what the gradient of the weight less the row's delta is
    // multiplied with: sigmoid(logit) / Z.
    static __device__ __forceinline__ float weight(float logit, Row inverse, float& kept) {
      float power;
      const float softplus = softplus_of_log2(logit, power);
      kept = (logit < 0 ? power : 1) * reciprocal_approx(1 + power) * inverse;
      return softplus * inverse * kWeightScale;
    }
    static __device__ __forceinline__ float gradient(float kept, float grad_weight, Row) { return kept * grad_weight; }
  };
};

}  // namespace attnx::cuda
