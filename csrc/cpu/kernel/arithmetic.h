// How an input type multiplies and adds: the type of the operands of a matrix product (Element), of its sums
// (Sum), and how many products one step of the contraction takes (kStep).
#pragma once

#include "convert.h"

namespace attnx::cpu::ATTNX_ISA {

template <class T>
struct FusedMultiplyAdd {
  using Element = T;
  using Sum = T;
  static constexpr int kStep = 1;
  using Operand = Vec<T>;

  static ATTNX_INLINE Operand broadcast(const Element* a) { return splat(*a); }
  static ATTNX_INLINE Operand operand(const Element* b) { return load(b); }
  static ATTNX_INLINE Vec<T> multiply_add(Operand a, Operand b, Vec<T> c) { return a * b + c; }

  // Stores kStep rows of sums as one step of a B operand; one row as it is.
  static ATTNX_INLINE void store_step(Element* p, const Vec<T> (&x)[kStep]) { store(p, x[0]); }
  static ATTNX_INLINE void store_row(Element* p, Vec<T> x) { store(p, x); }
};

#if defined(__AVX512BF16__)
// Products of pairs of bfloat16, summed in float32: twice the rate of FusedMultiplyAdd<float>.
struct PairsOfBFloat16 {
  using Element = BFloat16;
  using Sum = float;
  static constexpr int kStep = 2;
  using Operand = __m512bh;

  static ATTNX_INLINE Operand broadcast(const Element* a) {
    std::int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return bit_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static ATTNX_INLINE Operand operand(const Element* b) { return bit_cast<__m512bh>(_mm512_loadu_si512(b)); }
  static ATTNX_INLINE Vec<float> multiply_add(Operand a, Operand b, Vec<float> c) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, a, b);
  }

  static ATTNX_INLINE void store_step(Element* p, const Vec<float> (&x)[kStep]) {
    // Lanes 0..15 of the conversion hold x[0], lanes 16..31 x[1]; the permutation pairs them.
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const auto both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(pairs, both));
  }
  // Two rows as steps, to[width][2]; where there is no second row, as of zeros.
  static ATTNX_INLINE void interleave(const Element* first, const Element* second, std::int64_t width, Element* to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                         39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (std::int64_t d = 0; d < width; d += 32) {
      const __mmask32 there = width - d < 32 ? (1u << (width - d)) - 1 : ~0u;
      const __m512i a = _mm512_maskz_loadu_epi16(there, first + d);
      const __m512i b = second ? _mm512_maskz_loadu_epi16(there, second + d) : __m512i{};
      _mm512_mask_storeu_epi32(to + 2 * d, __mmask16(there), _mm512_permutex2var_epi16(a, low, b));
      _mm512_mask_storeu_epi32(to + 2 * d + 32, __mmask16(there >> 16), _mm512_permutex2var_epi16(a, high, b));
    }
  }
  static ATTNX_INLINE void store_row(Element* p, Vec<float> x) {
    _mm256_storeu_si256((__m256i*)p, bit_cast<__m256i>(_mm512_cvtneps_pbh((__m512)x)));
  }
};
#endif

template <class Input>
struct ArithmeticOf {
  using type = FusedMultiplyAdd<float>;
};
template <>
struct ArithmeticOf<double> {
  using type = FusedMultiplyAdd<double>;
};
#if defined(__AVX512BF16__)
template <>
struct ArithmeticOf<BFloat16> {
  using type = PairsOfBFloat16;
};
#endif
template <class Input>
using Arithmetic = typename ArithmeticOf<Input>::type;

}  // namespace attnx::cpu::ATTNX_ISA
