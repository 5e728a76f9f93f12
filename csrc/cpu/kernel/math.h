// These are exp, log, reciprocal, tanh and softplus on vectors.
#pragma once

#include "simd.h"

namespace attnx::cpu::ATTNX_ISA {

// e^x for x <= 88; 0 below -87, so that it is 0 or a normal number. NaN stays NaN. Relative error 2^-22.
//
// x = n ln2 + r with |r| <= ln2 / 2; e^r by a polynomial of degree 5 (relative minimax, error 2^-23.2), 2^n by
// adding n to the exponent. Adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits. With fused
// multiply-add one constant for ln2 is enough: its error, 1.9e-9, times |n| <= 127 is below half a unit of the result's
// last place. Without, n ln2 would be rounded: then ln2 is the sum of two, of which the first has few enough bits.
ATTNX_INLINE Vec<float> exp(Vec<float> x) {
  constexpr float kRound = 12582912.0f, kLog2E = 1.44269504f, kLowest = -87.0f;
  const Vec<float> shifted = x * kLog2E + kRound;
  const Vec<float> n = shifted - kRound;
#if defined(__FMA__) || defined(__aarch64__)
  const Vec<float> r = x - n * 0.693147182f;
#else
  const Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
#endif
  Vec<float> p = r * 8.31250101e-3f + 4.18903306e-2f;
  p = p * r + 1.66671157e-1f;
  p = p * r + 4.99992311e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Mask<float> bits = bit_cast<Mask<float>>(p), exponent = bit_cast<Mask<float>>(shifted) << 23;
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kLowest), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_add_epi32(kept, (__m512i)bits, (__m512i)exponent);
#else
  return bit_cast<Vec<float>>((bits + exponent) & ~(x < kLowest));
#endif
}

// float64 exists for gradient checks: exactness counts, speed does not.
ATTNX_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// It returns the natural logarithm of a positive normal number, with a relative error below 2 units in the last place
// (Cephes' logf): that of the mantissa m, between sqrt(1/2) and sqrt(2), by a polynomial in m - 1, and ln2 times the
// exponent, as the sum of two.
ATTNX_INLINE Vec<float> log(Vec<float> x) {
  const Mask<float> bits = bit_cast<Mask<float>>(x);
  Vec<float> m = bit_cast<Vec<float>>((bits & 0x007fffff) | 0x3f000000);  // from 1/2 to below 1
  Mask<float> exponent = (bits >> 23) - 126;
  const Mask<float> low = m < 0.707106781f;  // -1 where it is true
  exponent += low;
  m = (low ? m + m : m) - 1.0f;
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>), square = m * m;
  Vec<float> p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vec<float> rest = p * m * square - e * 2.12194440e-4f - square * 0.5f;
  return m + rest + e * 0.693359375f;
}

// 1 / x for normal x with a normal reciprocal; relative error 2^-22.9.
ATTNX_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const auto r = (Vec<float>)_mm512_rcp14_ps((__m512)x);  // then one Newton step
  return r * (1.0f - x * r) + r;
#else
  return 1.0f / x;
#endif
}
ATTNX_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

// tanh(x); relative error below 3 units in the last place. Near 0 a polynomial in x^2 (Cephes' tanhf), elsewhere
// 1 - 2 / (e^2|x| + 1), which most vectors of capped logits do without.
ATTNX_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> size = absolute(x), square = x * x;
  Vec<float> p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec<float> near = p * square * x + x;
  if (bits(size >= 0.625f) == 0) return near;  // a NaN stays one
  const Vec<float> far = 1.0f - 2.0f * reciprocal(exp(at_most(2.0f * size, 86.0f)) + 1.0f);
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}
ATTNX_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// It sets the sign.
template <class V>
ATTNX_INLINE V minus_absolute(V x) {
  using Bits = decltype(x < x);
  return bit_cast<V>(bit_cast<Bits>(x) | bit_cast<Bits>(-V{}));
}

// ln(1 + e^x) = max(x, 0) + e ln(1 + e) / e with e = e^-|x|, which it sets. The quotient is a polynomial in e on [0, 1]
// (relative minimax, error 2^-22.3, and 2^-14.1 where kCoarse), so that small results keep their relative accuracy.
template <bool kCoarse>
ATTNX_INLINE Vec<float> softplus(Vec<float> x, Vec<float>& e) {
  e = exp(minus_absolute(x));
  Vec<float> p;
  if constexpr (kCoarse) {
    p = e * 4.13473017e-2f - 1.57427207e-1f;
    p = p * e + 3.06300929e-1f;
    p = p * e - 4.96977795e-1f;
    p = p * e + 9.99943278e-1f;
  } else {
    p = e * -8.53920861e-3f + 4.40896320e-2f;
    p = p * e - 1.07681713e-1f;
    p = p * e + 1.77452415e-1f;
    p = p * e - 2.44954628e-1f;
    p = p * e + 3.32754798e-1f;
    p = p * e - 4.99974054e-1f;
    p = p * e + 9.99999806e-1f;
  }
  return p * e + at_least(x, 0.0f);
}
template <bool kCoarse>
ATTNX_INLINE Vec<double> softplus(Vec<double> x, Vec<double>& e) {
  e = exp(minus_absolute(x));
  for (int i = 0; i < kLanes<double>; ++i) x[i] = (x[i] < 0 ? 0 : x[i]) + __builtin_log1p(e[i]);
  return x;
}

}  // namespace attnx::cpu::ATTNX_ISA
