// These are products of matrices in the type of sums, whose rows lie one after the other and fill whole vectors.
#pragma once

#include "gemm.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Sum>
struct Products {
  using A = FusedMultiplyAdd<Sum>;

  // It returns the size of rows that are read as A operands, either way around.
  static std::int64_t rows_size(std::int64_t rows, std::int64_t lanes) {
    return round_up(rows, kRowMultiple) * lanes + kRowMultiple;
  }

  // It computes c[rows][lanes] (+)= a[rows][steps] b[steps][lanes]. Rows are contiguous; one of c is as long as one of
  // b.
  static void multiply(const Sum* a, std::int64_t a_lanes, const Sum* b, std::int64_t b_lanes, Sum* c,
                       std::int64_t rows, std::int64_t steps, bool accumulate) {
    gemm<A>({a, a_lanes, 1, b, b_lanes, c, b_lanes}, rows, b_lanes / kLanes<Sum>, steps, accumulate);
  }
  // It does the same with a[steps][rows].
  static void multiply_transposed(const Sum* a, std::int64_t a_lanes, const Sum* b, std::int64_t b_lanes, Sum* c,
                                  std::int64_t rows, std::int64_t steps, bool accumulate) {
    gemm<A>({a, 1, a_lanes, b, b_lanes, c, b_lanes}, rows, b_lanes / kLanes<Sum>, steps, accumulate);
  }
  // It writes from[rows][from_lanes] as to[columns][to_lanes], with zeros in the lanes beyond rows.
  static void transpose(const Sum* from, std::int64_t from_lanes, std::int64_t rows, std::int64_t columns, Sum* to,
                        std::int64_t to_lanes) {
    constexpr std::int64_t kWidth = kLanes<Sum>;
    for (std::int64_t column = 0; column < columns; column += kWidth) {
      for (std::int64_t row = 0; row < to_lanes; row += kWidth) {
        Vec<Sum> x[kWidth];
        for (std::int64_t i = 0; i < kWidth; ++i)
          x[i] = row + i < rows ? load(from + (row + i) * from_lanes + column) : Vec<Sum>{};
        transpose_lanes<Sum>(x);
        for (std::int64_t i = 0; i < smaller(kWidth, columns - column); ++i)
          store(to + (column + i) * to_lanes + row, x[i]);
      }
    }
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
