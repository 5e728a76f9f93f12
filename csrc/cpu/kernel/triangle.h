// These are products with triangular matrices of a chunk of rows, and the equations that they make. They go, in blocks
// of rows, through nothing but what is not zero.
#pragma once

#include "products.h"

namespace attnx::cpu::ATTNX_ISA {

// Blocks of fewer rows leave out more of the other triangle; these fill the register blocks of gemm.
inline constexpr std::int64_t kTriangleRows = 16;

// It computes c[count][lanes] (+)= t[count][t_lanes] b[count][lanes], where t is lower triangular.
template <class Sum>
inline void multiply_lower(const Sum* t, std::int64_t t_lanes, const Sum* b, std::int64_t lanes, Sum* c,
                           std::int64_t count, bool accumulate) {
  for (std::int64_t first = 0; first < count; first += kTriangleRows) {
    const std::int64_t rows = smaller(kTriangleRows, count - first);
    Products<Sum>::multiply(t + first * t_lanes, t_lanes, b, lanes, c + first * lanes, rows, first + rows, accumulate);
  }
}
// It does the same with the transposed t.
template <class Sum>
inline void multiply_lower_transposed(const Sum* t, std::int64_t t_lanes, const Sum* b, std::int64_t lanes, Sum* c,
                                      std::int64_t count, bool accumulate) {
  for (std::int64_t first = 0; first < count; first += kTriangleRows) {
    const std::int64_t rows = smaller(kTriangleRows, count - first);
    Products<Sum>::multiply_transposed(t + first * t_lanes + first, t_lanes, b + first * lanes, lanes,
                                       c + first * lanes, rows, count - first, accumulate);
  }
}

// It computes what is not above the diagonal of c[count][lanes] = a[count][steps] b[steps][lanes]; of the rest some is
// left as it was.
template <class Sum>
inline void multiply_to_lower(const Sum* a, std::int64_t a_lanes, const Sum* b, std::int64_t lanes, Sum* c,
                              std::int64_t count, std::int64_t steps) {
  using A = FusedMultiplyAdd<Sum>;
  for (std::int64_t first = 0; first < count; first += kTriangleRows) {
    const std::int64_t end = smaller(first + kTriangleRows, count);
    gemm<A>({a + first * a_lanes, a_lanes, 1, b, lanes, c + first * lanes, lanes}, end - first,
            (end + kLanes<Sum> - 1) / kLanes<Sum>, steps, false);
  }
}

// x[count][lanes] becomes the y of y = x + t y, where t is strictly lower triangular.
template <class Sum>
inline void solve_lower(const Sum* t, std::int64_t t_lanes, Sum* x, std::int64_t lanes, std::int64_t count) {
  using A = FusedMultiplyAdd<Sum>;
  const std::int64_t vectors = lanes / kLanes<Sum>;
  for (std::int64_t first = 0; first < count; first += kTriangleRows) {
    const std::int64_t end = smaller(first + kTriangleRows, count);
    const Sum* const rows = t + first * t_lanes;
    if (first > 0) Products<Sum>::multiply(rows, t_lanes, x, lanes, x + first * lanes, end - first, first, true);
    for (std::int64_t i = first + 1; i < end; ++i)
      gemm_few_rows<A>({t + i * t_lanes + first, t_lanes, 1, x + first * lanes, lanes, x + i * lanes, lanes}, 1,
                       vectors, i - first, true);
  }
}
// It does the same with the transposed t.
template <class Sum>
inline void solve_lower_transposed(const Sum* t, std::int64_t t_lanes, Sum* x, std::int64_t lanes, std::int64_t count) {
  using A = FusedMultiplyAdd<Sum>;
  const std::int64_t vectors = lanes / kLanes<Sum>;
  for (std::int64_t first = (count - 1) / kTriangleRows * kTriangleRows; first >= 0; first -= kTriangleRows) {
    const std::int64_t end = smaller(first + kTriangleRows, count);
    if (end < count)
      Products<Sum>::multiply_transposed(t + end * t_lanes + first, t_lanes, x + end * lanes, lanes, x + first * lanes,
                                         end - first, count - end, true);
    for (std::int64_t i = end - 2; i >= first; --i)
      gemm_few_rows<A>({t + (i + 1) * t_lanes + i, 1, t_lanes, x + (i + 1) * lanes, lanes, x + i * lanes, lanes}, 1,
                       vectors, end - 1 - i, true);
  }
}

}  // namespace attnx::cpu::ATTNX_ISA
