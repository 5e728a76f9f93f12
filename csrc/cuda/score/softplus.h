// This is the softplus score, length-scaled softplus attention (arXiv 2501.13428): a weight is softplus(logit) / Z with
// the sum Z of its row. Logits of normalised rows are small, so that there is no maximum to run along and nothing to
// rescale; ln Z stands for the logsumexp.
#pragma once

#include <type_traits>

#include "cuda/common/ptx.h"
#include "cuda/common/reduce.h"
#include "cuda/common/sequence.h"
#include "cuda/mainloop/backward_arguments.h"
#include "cuda/score/sigmoid_formulas.h"

namespace attnx::cuda {

// This returns log2(1 + 2^y), and sets power to 2^-|y|. With e = 2^-|y| it is max(y, 0) + e (log2(1 + e) / e), where
// the quotient is a polynomial: lg2(1 + e) would lose all of a small e. Its relative error on [0, 1] is 5.7e-5,
// and 3.9e-4 where a weight is rounded to bfloat16, whose own is 3.9e-3.
template <class Rounded>
__device__ __forceinline__ float log2_of_1_plus_exp2(float y, float& power) {
  power = exp2_approx(-fabsf(y));
  float quotient;
  if constexpr (std::is_same_v<Rounded, __nv_bfloat16>) {
    quotient = fmaf(power, -0.10725444f, 0.36648063f);
    quotient = fmaf(power, quotient, -0.70174724f);
    quotient = fmaf(power, quotient, 1.4421281f);
  } else {
    quotient = fmaf(power, 0.05965155f, -0.22711945f);
    quotient = fmaf(power, quotient, 0.44189882f);
    quotient = fmaf(power, quotient, -0.71698743f);
    quotient = fmaf(power, quotient, 1.4426132f);
  }
  return fmaf(power, quotient, fmaxf(y, 0));
}

// This returns the softplus of a logit that is y / log2(e), and sets power to 2^-|y|.
__device__ __forceinline__ float softplus_of_log2(float y, float& power) {
  return log2_of_1_plus_exp2<float>(y, power) * kLn2;
}

// This has a thread's kRows rows in the forward. Weights are softplus(logit) / ln 2, as a factor cancels.
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
    const float p = log2_of_1_plus_exp2<Input>(s * multiplier_, power);
    sum_[row] += p;
    return p;
  }

  // This returns what the row's sums are multiplied with in the end. A row that sees no key has sums of 0.
  __device__ __forceinline__ float finish(int row) {
    sum_[row] = sum_of_quad(sum_[row]);
    return sum_[row] == 0 ? 1 : 1 / sum_[row];
  }
  // This is valid after finish(). The logarithm of 0 is -inf, as for a row that sees no key.
  __device__ __forceinline__ float logsumexp(int row) const { return log2f(sum_[row] * kLn2) * kLn2; }
};

// This is the score policy.
struct Softplus {
  static constexpr bool kNormalised = true, kBandOnly = true;
  // In sm_90's forward the compiler would else keep where a row's output goes: 64 bytes of spills with 64 features.
  static constexpr bool kFindsOutputAnew = true;

  struct Parameters {};  // what rows read in the forward
  static Parameters parameters(const AttentionParams&) { return {}; }

  template <class Input, class Tile, int kRows>
  using Forward = SoftplusForward<Input, kRows>;

  // The backward sees a logit, times log2(e), and its row's offset, which is 1 / Z.
  template <class Input>
  struct Backward {
    static constexpr bool kHasRows = true;
    // Weights near 1 / length would be subnormal in float16. These are over ln 2, too.
    static constexpr float kWeightScale = cuda::kWeightScale<Input> * kLog2E;

    using Row = float;
    static __device__ __forceinline__ Row row(const BackwardScratch&, std::int64_t, float offset) { return offset; }

    // This returns the weight times kWeightScale, and keeps what the gradient of the weight less the row's delta is
    // multiplied with: sigmoid(logit) / Z.
    static __device__ __forceinline__ float weight(float logit, Row inverse, float& kept) {
      float power;
      const float softplus = log2_of_1_plus_exp2<Input>(logit, power);
      kept = (logit < 0 ? power : 1) * reciprocal_approx(1 + power) * inverse;
      return softplus * inverse * cuda::kWeightScale<Input>;
    }
    static __device__ __forceinline__ float gradient(float kept, float grad_weight, Row) { return kept * grad_weight; }
  };
};

}  // namespace attnx::cuda
