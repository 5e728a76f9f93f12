// Vectors of the instruction set this file is compiled for (ATTNX_ISA, ATTNX_VECTOR_BYTES).
//
// Everything under kernel/ lives in a namespace named after the instruction set and uses no inline function of
// another library: a weak symbol compiled for AVX-512 must never be what the linker keeps for everyone.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ATTNX_INLINE __attribute__((always_inline)) inline

namespace attnx::cpu::ATTNX_ISA {

inline constexpr int kVectorBytes = ATTNX_VECTOR_BYTES;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

// The integer with as many bits as T: what comparing vectors of T yields.
template <class T>
struct MaskOf;
template <>
struct MaskOf<float> {
  using type = std::int32_t;
};
template <>
struct MaskOf<double> {
  using type = std::int64_t;
};
template <class T>
using MaskInt = typename MaskOf<T>::type;
template <class T>
using Mask = Vec<MaskInt<T>>;

template <class T>
ATTNX_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
ATTNX_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
ATTNX_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class To, class From>
ATTNX_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

// min and max keep a NaN in x, as a comparison that is false keeps x.
ATTNX_INLINE Vec<float> at_least(Vec<float> x, float low) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
#else
  return x < low ? splat(low) : x;
#endif
}
ATTNX_INLINE Vec<float> at_most(Vec<float> x, float high) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
#else
  return x > high ? splat(high) : x;
#endif
}
// The larger of two; where either is NaN, any of the two.
template <class V>
ATTNX_INLINE V maximum(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}
// The smaller of two, likewise.
template <class V>
ATTNX_INLINE V minimum(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}
template <class V>
ATTNX_INLINE V absolute(V x) {
  return x < 0 ? -x : x;
}

// One bit for each lane, set where the comparison was true.
template <class M>
ATTNX_INLINE unsigned bits(M mask) {
  constexpr int kCount = int(sizeof(mask) / sizeof(mask[0]));
#if defined(__AVX512F__)
  if constexpr (sizeof(mask[0]) == 4) return _mm512_movepi32_mask((__m512i)mask);
  if constexpr (sizeof(mask[0]) == 8) return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX__)
  if constexpr (sizeof(mask[0]) == 4) return unsigned(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  if constexpr (sizeof(mask[0]) == 4) return unsigned(_mm_movemask_ps((__m128)mask));
#endif
  unsigned all = 0;
  for (int i = 0; i < kCount; ++i) all |= unsigned(mask[i] != 0) << i;
  return all;
}

// table[index % 4] in each group of four lanes, which all hold the same table; the other bits of index have no part.
#if defined(__AVX512F__)
inline constexpr bool kHasLookup = true;
ATTNX_INLINE Vec<float> lookup(Vec<float> table, Vec<std::uint32_t> index) {
  return (Vec<float>)_mm512_permutevar_ps((__m512)table, (__m512i)index);
}
#elif defined(__AVX__)
inline constexpr bool kHasLookup = true;
ATTNX_INLINE Vec<float> lookup(Vec<float> table, Vec<std::uint32_t> index) {
  return (Vec<float>)_mm256_permutevar_ps((__m256)table, (__m256i)index);
}
#else
inline constexpr bool kHasLookup = false;
ATTNX_INLINE Vec<float> lookup(Vec<float> table, Vec<std::uint32_t>) { return table; }
#endif

// Eight words, over and over.
ATTNX_INLINE Vec<std::uint32_t> load_eight(const std::uint32_t* p) {
#if defined(__AVX512F__)
  return (Vec<std::uint32_t>)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
#else
  return load(p);  // or as many as there are lanes
#endif
}

// Of all lanes; for what happens once a tile.
template <class T>
ATTNX_INLINE T sum_of_lanes(Vec<T> x) {
  T sum = x[0];
  for (int i = 1; i < kLanes<T>; ++i) sum += x[i];
  return sum;
}
template <class T>
ATTNX_INLINE T largest_lane(Vec<T> x) {
  T largest = x[0];
  for (int i = 1; i < kLanes<T>; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}
// Lane i is the sum of the lanes of vector i: in log2(lanes) rounds, each of which folds two vectors into one.
template <class T>
ATTNX_INLINE Vec<T> sums_of_lanes(Vec<T> (&x)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  Mask<T> low{}, high{};  // lanes of two vectors side by side: a0 b0 a1 b1 ...
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    low[i] = MaskInt<T>(i / 2 + i % 2 * n);
    high[i] = MaskInt<T>((n + i) / 2 + i % 2 * n);
  }
#pragma GCC unroll 4
  for (int half = n / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      x[i] = __builtin_shuffle(x[i], x[i + half], low) + __builtin_shuffle(x[i], x[i + half], high);
  return x[0];
}
// The last lane comes first.
template <class T>
ATTNX_INLINE Vec<T> reversed(Vec<T> x) {
  Mask<T> lanes{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = MaskInt<T>(kLanes<T> - 1 - i);
  return __builtin_shuffle(x, lanes);
}
// Lane i of vector j and lane j of vector i change places: in rounds, each of which swaps the two blocks off the
// diagonal within every block of the round before. The last two rounds of four-byte numbers are one of pairs and one of
// pairs of these, which x86 has an instruction for each.
template <class T>
ATTNX_INLINE void transpose_lanes(Vec<T> (&x)[kLanes<T>]) {
  constexpr int n = kLanes<T>, kLast = sizeof(T) == 4 ? 4 : 1;
#pragma GCC unroll 4
  for (int half = n / 2; half >= kLast; half /= 2) {
    Mask<T> upper{}, lower{};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      upper[i] = MaskInt<T>(i & half ? n + i - half : i);
      lower[i] = MaskInt<T>(i & half ? n + i : i + half);
    }
#pragma GCC unroll 8
    for (int first = 0; first < n; first += 2 * half)
#pragma GCC unroll 8
      for (int i = first; i < first + half; ++i) {
        const Vec<T> a = x[i], b = x[i + half];
        x[i] = __builtin_shuffle(a, b, upper);
        x[i + half] = __builtin_shuffle(a, b, lower);
      }
  }
  if constexpr (kLast == 4) {
    Mask<T> low{}, high{}, first{}, second{};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      const int lane = i & 3, group = i & ~3;
      low[i] = MaskInt<T>((lane & 1 ? n : 0) + group + lane / 2);
      high[i] = low[i] + 2;
      first[i] = MaskInt<T>((lane & 2 ? n : 0) + group + (lane & 1));
      second[i] = first[i] + 2;
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i += 4) {
      const Vec<T> a = __builtin_shuffle(x[i], x[i + 1], low), b = __builtin_shuffle(x[i], x[i + 1], high);
      const Vec<T> c = __builtin_shuffle(x[i + 2], x[i + 3], low), d = __builtin_shuffle(x[i + 2], x[i + 3], high);
      x[i] = __builtin_shuffle(a, c, first), x[i + 1] = __builtin_shuffle(a, c, second);
      x[i + 2] = __builtin_shuffle(b, d, first), x[i + 3] = __builtin_shuffle(b, d, second);
    }
  }
}
// 0, 1, 2, ...
template <class T>
ATTNX_INLINE Vec<T> lane_numbers() {
  Vec<T> x;
  for (int i = 0; i < kLanes<T>; ++i) x[i] = T(i);
  return x;
}

constexpr std::int64_t round_up(std::int64_t x, std::int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
template <int value>
struct Constant {
  static constexpr int kValue = value;
};
template <class T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

}  // namespace attnx::cpu::ATTNX_ISA
