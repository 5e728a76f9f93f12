// The 16-bit formats, and rows converted between what the user stores and what the loop computes with.
#pragma once

#include "simd.h"

namespace attnx::cpu::ATTNX_ISA {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
#if defined(__aarch64__)
using NativeHalf = __fp16;
#else
using NativeHalf = _Float16;
#endif

ATTNX_INLINE float to_float(float x) { return x; }
ATTNX_INLINE float to_float(BFloat16 x) { return bit_cast<float>(std::uint32_t(x.bits) << 16); }
ATTNX_INLINE float to_float(Float16 x) { return float(bit_cast<NativeHalf>(x.bits)); }
ATTNX_INLINE double to_float(double x) { return x; }

template <class T>
ATTNX_INLINE T from_float(float x) {
  if constexpr (__is_same(T, BFloat16)) {
    const auto bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    return {std::uint16_t(x != x ? (bits >> 16) | 0x40 : rounded >> 16)};
  } else if constexpr (__is_same(T, Float16)) {
    return {bit_cast<std::uint16_t>(NativeHalf(x))};
  } else {
    return x;
  }
}
template <class T>
ATTNX_INLINE T from_float(double x) {
  static_assert(__is_same(T, double));
  return x;
}

// A vector of float16, from its bits.
ATTNX_INLINE Vec<float> load_halves(const std::uint16_t* bits) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)bits));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)bits));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = to_float(Float16{bits[i]});
  return x;
#endif
}

// A vector of numbers as sums have them.
template <class Sum>
ATTNX_INLINE Vec<Sum> load_as(const Sum* p) {
  return load(p);
}
template <class Sum>
ATTNX_INLINE Vec<Sum> load_as(const BFloat16* p) {
  typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  Half bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bit_cast<Vec<Sum>>(__builtin_convertvector(bits, Vec<std::uint32_t>) << 16);
}
template <class Sum>
ATTNX_INLINE Vec<Sum> load_as(const Float16* p) {
  return load_halves(&p->bits);
}

// A vector of flags, of which each is a byte, as a mask.
template <class Sum>
ATTNX_INLINE Mask<Sum> load_flags(const std::uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Sum) == 4) return (Mask<Sum>)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)) != 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(Sum) == 4) return (Mask<Sum>)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)) != 0;
#endif
  typedef std::uint8_t Bytes __attribute__((vector_size(kLanes<Sum>)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Mask<Sum>) != 0;
}

// One row of n numbers. The compiler vectorises all of these but float16, whose instructions it needs told.
template <class To, class From>
inline void convert_row(To* __restrict to, const From* __restrict from, std::int64_t n) {
  std::int64_t i = 0;
  if constexpr (__is_same(To, From)) {
    // A row is short beside a call of memcpy.
    constexpr std::int64_t kBlock = kVectorBytes / std::int64_t(sizeof(To));
    for (; i + kBlock <= n; i += kBlock) __builtin_memcpy(to + i, from + i, kVectorBytes);
  } else if constexpr (__is_same(From, Float16) && __is_same(To, float)) {
#if defined(__F16C__) || defined(__AVX512F__)
    for (; i + kLanes<float> <= n; i += kLanes<float>) store(to + i, load_halves(&from[i].bits));
#endif
  } else if constexpr (__is_same(From, float) && __is_same(To, Float16)) {
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  }
  for (; i < n; ++i) {
    if constexpr (__is_same(To, From)) {
      to[i] = from[i];
    } else if constexpr (__is_same(To, float) || __is_same(To, double)) {
      to[i] = to_float(from[i]);
    } else {
      to[i] = from_float<To>(to_float(from[i]));
    }
  }
}

// Whether all n numbers are finite: no exponent has all ones. The compiler has vectors for the largest of them.
template <class T>
inline bool all_finite(const T* x, std::int64_t n) {
  constexpr auto exponent = [] {
    if constexpr (__is_same(T, double)) return std::uint64_t(0x7ff0000000000000);
    if constexpr (__is_same(T, float)) return std::uint32_t(0x7f800000);
    if constexpr (__is_same(T, BFloat16)) return std::uint16_t(0x7f80);
    if constexpr (__is_same(T, Float16)) return std::uint16_t(0x7c00);
  };
  using Bits = decltype(exponent());
  constexpr Bits kExponent = exponent();
  Bits most = 0;
  for (std::int64_t i = 0; i < n; ++i) most = larger(most, Bits(bit_cast<Bits>(x[i]) & kExponent));
  return most != kExponent;
}

// Whether numbers that several panels meet are all finite: looked at when the first asks.
class Finiteness {
 public:
  void forget() { known_ = false; }
  template <class T>
  bool operator()(const T* x, std::int64_t n) {
    if (!known_) finite_ = all_finite(x, n);
    known_ = true;
    return finite_;
  }

 private:
  bool known_ = false, finite_ = false;
};

}  // namespace attnx::cpu::ATTNX_ISA
