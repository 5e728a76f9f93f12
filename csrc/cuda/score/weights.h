// The sigmoid on the special-function units and the FMA pipe: what a tensor core's product leaves time for.
//
// A logit x comes as y = -x log2(e). The relative error of a weight counts, as weights near 1/length are the working
// regime, so forms such as 0.5 + 0.5 tanh(x / 2), whose absolute error is small, are no use. 1 - p is t p with
// t = exp(-x), never 1 - p from a rounded p, and the derivative is t p p.
#pragma once

#include <type_traits>

#include "cuda/ptx.h"

namespace attnx::cuda {

// float16 weights below 6e-5 would be subnormal: they are kept times 2^15, and the sums divided at the end.
template <class Input>
inline constexpr float kWeightScale = std::is_same_v<Input, __half> ? 0x1p15f : 1.0f;

__device__ __forceinline__ float min_keeping_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// A product whose subnormal factors count as 0.
__device__ __forceinline__ float multiply_flushing(float x, float y) {
  float z;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// 1 / (1 + 2^y) with two special functions; relative error 2^-19.
struct ExactSigmoid {
  template <class Input>
  static __device__ __forceinline__ float weight(float y) {
    constexpr float kUnit = 1 / kWeightScale<Input>;
    return reciprocal_approx(fmaf(exp2_approx(y), kUnit, kUnit));
  }

  // The weight, unscaled, and its derivative t p p. At 2^127, the largest power whose successor is finite, both are 0.
  static __device__ __forceinline__ float weight_and_derivative(float y, float& derivative) {
    const float t = exp2_approx(min_keeping_nan(y, 127)), p = reciprocal_approx(1 + t);
    derivative = t * p * p;
    return p;
  }
};

// One special function. The reciprocal starts from the bits of d, which are a piecewise linear logarithm, and takes one
// step of Newton's method with constants fitted to the relative error over one period (kernels' notes: docs/notes).
// Rounded to bfloat16 the weight is within 2^-7.6 of the truth; for float16 a quadratic step brings 2^-16.
struct NewtonSigmoid {
  template <class Input>
  static __device__ __forceinline__ float weight(float y) {
    constexpr float kUnit = 1 / kWeightScale<Input>;
    // At 2^126, where the bits run out of exponents, r is subnormal and the weight 0: that of a masked key.
    const float d = fmaf(exp2_approx(min_keeping_nan(y, 126)), kUnit, kUnit);
    if constexpr (std::is_same_v<Input, __half>) {
      const float r = __int_as_float(0x7EE00000 - __float_as_int(d)), e = d * r;
      return multiply_flushing(r, fmaf(e, fmaf(e, 1.32781686f, -3.62556308f), 3.29859858f));
    } else {
      const float r = __int_as_float(0x7EF34080 - __float_as_int(d));
      return multiply_flushing(r, fmaf(-d, r, 2.0013f));
    }
  }
};

}  // namespace attnx::cuda
