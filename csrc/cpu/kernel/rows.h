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

// Lane `lane` of columns[dim][lanes], times factor, as a row of the user's type.
template <class Sum, class Output>
inline void store_lane(const Sum* columns, int lane, std::int64_t dim, Sum factor, Output* to) {
  Sum row[kMaxHeadDim];
  for (std::int64_t d = 0; d < dim; ++d) row[d] = columns[d * kPanelLanes<Sum> + lane] * factor;
  convert_row(to, row, dim);
}

}  // namespace attnx::cpu::ATTNX_ISA
