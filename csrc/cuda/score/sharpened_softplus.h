// This is the sharpened softplus score (arXiv 2501.13428): a weight is a power of how far the softplus of a logit
// stands above the row's mean.
//
//     v = max(gain softplus(t) - shift, 0)      b = v^p      P = b / sum b
//
// A pass before this one knows gain and shift of each row (reduction/softplus_rows.h). v is 1 at the largest logit, so
// that no power overflows; where v^p would be below 2^-100, v counts as 0.
#pragma once

#include "cuda/mainloop/backward_arguments.h"
#include "cuda/score/softplus.h"

namespace attnx::cuda {

__device__ __forceinline__ float lowest_of_power(float power) { return exp2_approx(-100 / power); }

// This returns v, and sets decay to 2^-|y| of the logit y, times log2(e). NaN stays one.
__device__ __forceinline__ float above_mean(float y, float gain, float shift, float lowest, float& decay) {
  const float v = fmaf(softplus_of_log2(y, decay), gain, -shift);
  return v <= lowest ? 0 : v;
}

// This has a thread's kRows rows in the forward.
template <class Input_, int kRows>
class SharpenedSoftplusForward {
  float gain_[kRows], shift_[kRows], threshold_[kRows], sum_[kRows];  // the thread's part of the sum
  float multiplier_, power_, lowest_;

 public:
  using Input = Input_;

  template <class Parameters>
  __device__ __forceinline__ void read_row(int row, const Parameters& parameters, int batch, const Sequence& sequence,
                                           int head, int query) {
    power_ = parameters.power;
    lowest_ = lowest_of_power(power_);
    const auto number = [&](const Tensor& x) {
      return __ldg(rows_of<const float>(x, batch, head, sequence.first_q + query));
    };
    gain_[row] = number(parameters.gain);
    shift_[row] = number(parameters.shift);
    sum_[row] = 0;
    // v is surely 0 up to this logit, times log2(e), whose softplus is (shift + lowest) / gain; less what is rounded.
    const float softplus = (shift_[row] + lowest_) / gain_[row];
    const float logit = softplus > 30 ? softplus : logf(expm1f(softplus));
    threshold_[row] = isnan(softplus) ? -INFINITY : (logit - 1e-4f * (1 + fabsf(logit))) * kLog2E;
  }

  template <bool kHasBias, int kM, int kN, int kD>
  __device__ __forceinline__ void begin(const float (&)[kM][kN][4], float (&)[kM][kD][4], float multiplier, float,
                                        float) {
    static_assert(!kHasBias);
    multiplier_ = multiplier;
  }

  // This tells whether a logit of the warp's rows has a weight.
  template <int kM, int kN>
  __device__ __forceinline__ bool weighs(const float (&s)[kM][kN][4]) const {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) any |= !(s[r / 2][n][r % 2 * 2 + e] * multiplier_ <= threshold_[r]);
    return __any_sync(~0u, any);
  }

  __device__ __forceinline__ float weight(float s, int row) {
    float decay;
    const float v = above_mean(s * multiplier_, gain_[row], shift_[row], lowest_, decay);
    const float p = exp2_approx(power_ * log2_approx(v));
    sum_[row] += p;
    return p;
  }

  __device__ __forceinline__ float finish(int row) {
    sum_[row] = sum_of_quad(sum_[row]);
    return sum_[row] == 0 ? 1 : 1 / sum_[row];
  }
  __device__ __forceinline__ float logsumexp(int row) const { return log2f(sum_[row]) * kLn2; }
};

// This is the score policy. It has sm_80's loops alone: special functions, three a score forward and eight backward,
// and the passes before would leave little of what sm_90's products save (docs/notes/hopper-forward.md counts it).
struct SharpenedSoftplus {
  static constexpr bool kNormalised = true, kBandOnly = true;

  struct Parameters {
    Tensor gain, shift;
    float power;
  };
  static Parameters parameters(const AttentionParams& p) {
    return {p.sharpening.gain, p.sharpening.shift, float(p.sharpening.power)};
  }

  template <class Input, class Tile, int kRows>
  using Forward = SharpenedSoftplusForward<Input, kRows>;

  // With w = v^(p - 1), the sum S of the row's b, and D = dP - delta:
  //
  //     P = v w / S      dt = sigmoid(t) p / S (gain w D - of_mean)
  //
  // where of_mean is (gain / n) sum_j w_j D_j, of a pass before, or 0 in a row from whose weights no mean is taken.
  template <class Input>
  struct Backward {
    static constexpr bool kHasRows = true;
    static constexpr float kWeightScale = cuda::kWeightScale<Input>;

    struct Row : SharpenedRow {
      float lowest;   // v of which the power counts
      float inverse;  // 1 / S

      __device__ __forceinline__ Row(const SharpenedRow& row, float own_inverse)
          : SharpenedRow(row), lowest(lowest_of_power(row.power)), inverse(own_inverse) {}
    };
    static __device__ __forceinline__ Row row(const BackwardScratch& rows, std::int64_t row, float offset) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(rows.sharpened + row));
      return {{x.x, x.y, x.z, x.w}, offset};
    }

    // This returns w, and sets v and sigmoid(t).
    static __device__ __forceinline__ float lower_power(float logit, const Row& row, float& v, float& slope) {
      float decay;
      v = above_mean(logit, row.gain, row.shift, row.lowest, decay);
      slope = (logit < 0 ? decay : 1) * reciprocal_approx(1 + decay);
      return v == 0 ? 0 : exp2_approx((row.power - 1) * log2_approx(v));
    }

    // This returns the weight times kWeightScale. The gradient is made from the logit again, as it has two parts.
    static __device__ __forceinline__ float weight(float logit, const Row& row, float& kept) {
      float v, slope;
      kept = logit;
      const float w = lower_power(logit, row, v, slope);
      return v * w * row.inverse * kWeightScale;
    }
    static __device__ __forceinline__ float gradient(float logit, float grad_weight, const Row& row) {
      float v, slope;
      const float w = lower_power(logit, row, v, slope);
      return slope * row.power * row.inverse * (row.gain * w * grad_weight - row.of_mean);
    }
  };
};

}  // namespace attnx::cuda
