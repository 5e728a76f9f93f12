// Rows on their way into and out of matrix products.
//
// An operand's step holds kStep rows: element (row, lane) of a B operand, or of an A operand contracted over rows,
// stands at step_index(row, lane, width).
#pragma once

#include "panel.h"

namespace attnx::cpu::ATTNX_ISA {

template <class A>
ATTNX_INLINE std::int64_t step_index(std::int64_t row, std::int64_t lane, std::int64_t width) {
  return (row / A::kStep * width + lane) * A::kStep + row % A::kStep;
}

// Copies rows row(0) .. row(count - 1) of dim numbers to to[count][stride], converted, zero beyond dim.
template <class A, class Row>
inline void load_rows(Row row, std::int64_t count, std::int64_t dim, typename A::Element* to, std::int64_t stride) {
  for (std::int64_t i = 0; i < count; ++i, to += stride) {
    convert_row(to, row(i), dim);
    for (std::int64_t d = dim; d < stride; ++d) to[d] = {};
  }
}

template <class T>
ATTNX_INLINE void set_zero(T* row, std::int64_t n) {
  __builtin_memset(row, 0, std::size_t(n) * sizeof(T));
}

// Asks for rows ahead of their use; a cache line has 64 bytes wherever this runs.
template <class Input>
inline void prefetch_rows(const Input* rows, std::int64_t count, std::int64_t dim, std::int64_t stride) {
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t d = 0; d < dim; d += 64 / std::int64_t(sizeof(Input)))
      __builtin_prefetch(rows + i * stride + d, 0, 2);
  }
}

// rows[count][stride] as steps over rows: to[count / kStep][width][kStep], the last step padded with a row of zeros.
template <class A>
inline void interleave_rows(const typename A::Element* rows, std::int64_t count, std::int64_t stride,
                            typename A::Element* __restrict to, std::int64_t width) {
  static_assert(A::kStep == 1 || A::kStep == 2);
  for (std::int64_t i = 0; i < count; i += A::kStep, rows += A::kStep * stride, to += A::kStep * width) {
    if constexpr (A::kStep == 1) {
      __builtin_memcpy(to, rows, std::size_t(width) * sizeof *to);
    } else {
      A::interleave(rows, i + 1 < count ? rows + stride : nullptr, width, to);
    }
  }
}

// rows[count][stride] transposed into a panel, steps over features: to[dim / kStep][lanes][kStep]. The last vector of
// lanes is zero beyond count, those after it are left alone.
template <class A>
inline void transpose_rows(const typename A::Element* rows, std::int64_t count, std::int64_t dim, std::int64_t stride,
                           typename A::Element* to) {
  using Word = typename A::Sum;  // a step of one row
  static_assert(sizeof(Word) == A::kStep * sizeof *rows);
  constexpr std::int64_t kWidth = kPanelLanes<Word>, kWords = kLanes<Word>;
  const std::int64_t words = (dim + A::kStep - 1) / A::kStep, n = smaller(words, kWords);
  for (std::int64_t lane = 0; lane < count; lane += kWords) {
    for (std::int64_t next = 0; next < words; next += kWords) {
      const std::int64_t first = smaller(next, words - n);  // the last block begins within the one before
      Vec<Word> x[kWords];
      for (std::int64_t i = 0; i < kWords; ++i) {
        const auto* const from = rows + (lane + i) * stride + first * A::kStep;
        x[i] = Vec<Word>{};
        if (lane + i >= count) continue;
        n == kWords ? __builtin_memcpy(&x[i], from, sizeof x[i])
                    : __builtin_memcpy(&x[i], from, std::size_t(n) * sizeof(Word));
      }
      transpose_lanes<Word>(x);
      for (std::int64_t i = 0; i < n; ++i)
        __builtin_memcpy(to + ((first + i) * kWidth + lane) * A::kStep, &x[i], sizeof x[i]);
    }
  }
}

// One vector of the lanes of columns[dim][lanes], from the given one on, as rows: to[lanes of the vector][stride].
template <class Sum>
inline void transpose_columns(const Sum* columns, std::int64_t dim, Sum* to, std::int64_t stride) {
  for (std::int64_t d = 0; d < dim; d += kLanes<Sum>) {
    Vec<Sum> x[kLanes<Sum>];
    for (std::int64_t i = 0; i < kLanes<Sum>; ++i)
      x[i] = d + i < dim ? load(columns + (d + i) * kPanelLanes<Sum>) : Vec<Sum>{};
    transpose_lanes<Sum>(x);
    for (std::int64_t i = 0; i < kLanes<Sum>; ++i) store(to + i * stride + d, x[i]);
  }
}

// The dot products of pairs of rows, a(i) and b(i) for i < count, of n features: to[count], filled up to whole vectors.
// Each is summed from its first feature on, as products of panels are, whose rounding it shares then: where a row sees
// few keys, much of it cancels. So the rows lie on the lanes.
template <class Sum, class RowA, class RowB>
inline void dots_of_rows(RowA a, RowB b, std::int64_t count, std::int64_t n, Sum* to) {
  constexpr std::int64_t kWidth = kLanes<Sum>;
  Sum rows[2][kWidth][kWidth] = {};
  for (std::int64_t first = 0; first < count; first += kWidth) {
    const std::int64_t lanes = smaller(kWidth, count - first);
    Vec<Sum> sum = {};
    for (std::int64_t d = 0; d < n; d += kWidth) {
      const std::int64_t features = smaller(kWidth, n - d);
      for (std::int64_t i = 0; i < lanes; ++i) {
        convert_row(rows[0][i], a(first + i) + d, features);
        convert_row(rows[1][i], b(first + i) + d, features);
      }
      Vec<Sum> x[kWidth], y[kWidth];
      for (std::int64_t i = 0; i < kWidth; ++i) x[i] = load(rows[0][i]), y[i] = load(rows[1][i]);
      transpose_lanes<Sum>(x);
      transpose_lanes<Sum>(y);
      for (std::int64_t i = 0; i < features; ++i) sum += x[i] * y[i];
    }
    store(to + first, sum);
  }
}

// Lane `lane` of columns[dim][lanes], times factor, as a row of the user's type.
template <class Sum, class Output>
inline void store_lane(const Sum* columns, int lane, std::int64_t dim, Sum factor, Output* to) {
  Sum row[kMaxHeadDim];
  for (std::int64_t d = 0; d < dim; ++d) row[d] = columns[d * kPanelLanes<Sum> + lane] * factor;
  convert_row(to, row, dim);
}

}  // namespace attnx::cpu::ATTNX_ISA
