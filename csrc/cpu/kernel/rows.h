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
      const std::uint32_t second = i + 1 < count ? 0xffff : 0;
      for (std::int64_t d = 0; d < width; ++d) {
        const std::uint32_t pair = rows[d].bits | (rows[stride + d].bits & second) << 16;
        __builtin_memcpy(to + 2 * d, &pair, sizeof pair);
      }
    }
  }
}

// rows[count][stride] transposed into a panel, steps over features: to[dim / kStep][lanes][kStep], zero in the lanes
// beyond count.
template <class A>
inline void transpose_rows(const typename A::Element* rows, std::int64_t count, std::int64_t dim, std::int64_t stride,
                           typename A::Element* to) {
  constexpr int kWidth = kPanelLanes<typename A::Sum>;
  for (std::int64_t d = 0; d < round_up(dim, A::kStep); d += A::kStep, to += kWidth * A::kStep) {
    for (std::int64_t lane = 0; lane < kWidth; ++lane) {
      for (int k = 0; k < A::kStep; ++k) {
        const bool real = lane < count && d + k < dim;
        to[lane * A::kStep + k] = real ? rows[lane * stride + d + k] : typename A::Element{};
      }
    }
  }
}

// A square of words transposed in registers: after log2(lanes) perfect shuffles of its rows.
template <class Word, class Row>
ATTNX_INLINE void transpose_square(Row from, Word* to, std::int64_t to_stride) {
  constexpr int n = kLanes<Word>;
  Vec<Word> low{}, high{};  // lanes of two vectors side by side: a0 b0 a1 b1 ...
  for (int i = 0; i < n; ++i) {
    low[i] = Word(i / 2 + i % 2 * n);
    high[i] = Word((n + i) / 2 + i % 2 * n);
  }
  Vec<Word> row[n], shuffled[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) row[i] = load<Word>(from(i));
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      shuffled[2 * i] = __builtin_shuffle(row[i], row[i + n / 2], low);
      shuffled[2 * i + 1] = __builtin_shuffle(row[i], row[i + n / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) row[i] = shuffled[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store(to + i * to_stride, row[i]);
}

// Rows row(0) .. row(count - 1) of dim numbers as steps over features: to[dim / kStep][width][kStep], zero in the lanes
// up to the next whole vector. scratch holds kLanes<Sum> rows of `stride` elements, a multiple of kRowMultiple, for
// rows that are converted, or do not fill a square.
template <class A, class Input, class Row>
inline void load_rows_transposed(Row row, std::int64_t count, std::int64_t dim, typename A::Element* scratch,
                                 std::int64_t stride, typename A::Element* to, std::int64_t width) {
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  using Word = MaskInt<Sum>;  // a step of one row
  constexpr int kWords = kLanes<Sum>;
  static_assert(sizeof(Element) * A::kStep == sizeof(Word));
  for (std::int64_t first = 0; first < count; first += kWords, to += kWords * A::kStep) {
    const std::int64_t rows = smaller<std::int64_t>(count - first, kWords);
    const bool in_place = __is_same(Input, Element) && rows == kWords && dim % (kWords * A::kStep) == 0;
    if (!in_place) {
      load_rows<A>([&](std::int64_t i) { return row(first + i); }, rows, dim, scratch, stride);
      __builtin_memset(scratch + rows * stride, 0, std::size_t((kWords - rows) * stride) * sizeof *scratch);
    }
    for (std::int64_t step = 0; step < (dim + A::kStep - 1) / A::kStep; step += kWords) {
      const auto from = [&](std::int64_t i) __attribute__((always_inline)) {
        const void* const start = in_place ? static_cast<const void*>(row(first + i)) : scratch + i * stride;
        return static_cast<const Word*>(start) + step;
      };
      transpose_square<Word>(from, reinterpret_cast<Word*>(to) + step * width, width);
    }
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
