// This computes the sigmoid on the special-function units and the FMA pipe, in the time that a tensor core's product
// leaves.
//
// A logit x comes as y = -x log2(e). The relative error of a weight counts, as weights near 1/length are the working
// regime, so forms such as 0.5 + 0.5 tanh(x / 2), whose absolute error is small, are no use. 1 - p is t p with
// t = exp(-x), never 1 - p from a rounded p, and the derivative is t p p.
#pragma once

#include <type_traits>

#include "cuda/common/ptx.h"

namespace attnx::cuda {

// float16 weights below 6e-5 would be subnormal, so they are kept times 2^15, and the sums are divided at the end.
template <class Input>
inline constexpr float kWeightScale = std::is_same_v<Input, __half> ? 0x1p15f : 1.0f;

// This computes 1 / (1 + 2^y) with two special functions; its relative error is 2^-19.
struct ExactSigmoid {
  template <class Input>
  static constexpr float kScale = kWeightScale<Input>;  // the scale of weight()

  template <class Input>
  static __device__ __forceinline__ float weight(float y) {
    constexpr float kUnit = 1 / kWeightScale<Input>;
    return reciprocal_approx(fmaf(exp2_approx(y), kUnit, kUnit));
  }

  // This returns the weight, unscaled, and sets its derivative t p p. At 2^127, the largest power whose successor is
  // finite, both are 0.
  static __device__ __forceinline__ float weight_and_derivative(float y, float& derivative) {
    const float t = exp2_approx(min_keeping_nan(y, 127)), p = reciprocal_approx(1 + t);
    derivative = t * p * p;
    return p;
  }
};

// This computes the weight and its derivative by the logit, which are operands together. float16 weights below 1e-6 are
// subnormal, and a derivative times the tangent of its logit may be as large as 1000.
struct SigmoidWithDerivative {
  template <class Input>
  static constexpr float kScale = std::is_same_v<Input, __half> ? 0x1p6f : 1.0f;

  template <class Input>
  static __device__ __forceinline__ float weight(float y, float& derivative) {
    const float p = ExactSigmoid::weight_and_derivative(y, derivative);
    derivative *= kScale<Input>;
    return p * kScale<Input>;
  }
};

// This uses one special function. The reciprocal starts from the bits of d, which are a piecewise linear logarithm, and
// takes one step of Newton's method with constants fitted to the relative error over one period (the kernels' notes in
// docs/notes say more). Rounded to bfloat16 the weight is within 2^-7.6 of the truth; for float16 a quadratic step
// brings 2^-16.
//
// Nothing bounds the power: the scale keeps d below 2^126 as long as the power is finite, where the bits of r are those
// of a positive number. An infinite power, of a masked key, makes the weight -inf, which pack_nonnegative turns into 0.
struct NewtonSigmoid {
  template <class Input>
  static constexpr float kScale = std::is_same_v<Input, __half> ? kWeightScale<Input> : 4;

  template <class Input>
  static __device__ __forceinline__ float weight(float y) {
    constexpr float kUnit = 1 / kScale<Input>;
    const float d = fmaf(exp2_approx(y), kUnit, kUnit);
    // A difference would run on the integer pipe, which has the packing to do. The launch is one block high, but the
    // assembler does not know it, so that this is a multiplication and an addition.
    const int negative = __float_as_int(d) * -int(gridDim.y);
    if constexpr (std::is_same_v<Input, __half>) {
      const float r = __int_as_float(0x7EE00000 + negative), e = d * r;
      return r * fmaf(e, fmaf(e, 1.32781686f, -3.62556308f), 3.29859858f);
    } else {
      const float r = __int_as_float(0x7EF34080 + negative);
      return r * fmaf(-d, r, 2.0013f);
    }
  }
};

}  // namespace attnx::cuda
