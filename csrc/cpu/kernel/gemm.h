// The one matrix product of the library: C[rows][lanes] (+)= A[rows][steps] B[steps][lanes].
//
// A is read by broadcast, with any strides, so keys and values are used as they lie; B and C have their lanes
// contiguous. A block of C stays in registers over the whole contraction and is added to memory at its end, so that
// long sums are sums of shorter ones.
#pragma once

#include "arithmetic.h"

namespace attnx::cpu::ATTNX_ISA {

// Rows of a register block for a number of vectors across: accumulators + vectors of B + one broadcast fit the
// 32 registers of AVX-512 and NEON, or the 16 of SSE and AVX2. Every entry divides kRowMultiple.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kBlockRows[] = {0, 12, 8, 8, 6};
inline constexpr int kMaxVectors = 4;
#else
inline constexpr int kBlockRows[] = {0, 8, 6, 4};
inline constexpr int kMaxVectors = 3;
#endif
// Callers pad A's rows to this; what stands in the padding is read, and nothing comes of it.
inline constexpr int kRowMultiple = 24;

// Strides count elements; a_step and b_step go from one step (kStep products) to the next.
template <class A>
struct GemmOperands {
  const typename A::Element* a;
  std::int64_t a_row, a_step;
  const typename A::Element* b;
  std::int64_t b_step;
  typename A::Sum* c;
  std::int64_t c_row;
};

template <class A, int kVectors, int kRows = kBlockRows[kVectors]>
inline void gemm_columns(GemmOperands<A> g, std::int64_t rows, std::int64_t steps, bool accumulate) {
  using Sum = typename A::Sum;
  constexpr int kWidth = kLanes<Sum>;
  for (std::int64_t row = 0; row < rows; row += kRows, g.a += kRows * g.a_row, g.c += kRows * g.c_row) {
    Vec<Sum> sum[kRows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<Sum>{};
    const auto* a = g.a;
    const auto* b = g.b;
    for (std::int64_t s = 0; s < steps; ++s, a += g.a_step, b += g.b_step) {
      typename A::Operand column[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) column[v] = A::operand(b + v * kWidth * A::kStep);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const auto x = A::broadcast(a + r * g.a_row);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = A::multiply_add(x, column[v], sum[r][v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= rows) break;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Sum* const c = g.c + r * g.c_row + v * kWidth;
        store(c, accumulate ? load(c) + sum[r][v] : sum[r][v]);
      }
    }
  }
}

// Longer contractions are cut, for the accuracy of their sums: at 128 steps gradients at a head_dim of 128 had up to
// 2.3 times the largest float32 error of plain PyTorch, at 64 they have 1.2 times, for 1 to 2 % more time.
inline constexpr std::int64_t kMaxSteps = 64;

template <class A>
inline void gemm(GemmOperands<A> g, std::int64_t rows, std::int64_t vectors, std::int64_t steps, bool accumulate) {
  for (; steps > kMaxSteps; steps -= kMaxSteps, accumulate = true) {
    gemm(g, rows, vectors, kMaxSteps, accumulate);
    g.a += kMaxSteps * g.a_step;
    g.b += kMaxSteps * g.b_step;
  }
  // Blocks of one vector less have more rows, and fit some numbers of rows better: 64 are 8 times 8, and 11 times 6
  // less what is idle of the last.
  const auto rows_of = [&](int n) { return round_up(rows, kBlockRows[n]); };
  const std::int64_t most = rows_of(kMaxVectors) > rows_of(kMaxVectors - 1) ? kMaxVectors - 1 : kMaxVectors;
  while (vectors > 0) {
    // Even shares: 5 vectors go as 3 + 2, not 4 + 1.
    const std::int64_t blocks = (vectors + most - 1) / most;
    const std::int64_t n = (vectors + blocks - 1) / blocks;
    switch (n) {
      case 1: gemm_columns<A, 1>(g, rows, steps, accumulate); break;
      case 2: gemm_columns<A, 2>(g, rows, steps, accumulate); break;
      case 3: gemm_columns<A, 3>(g, rows, steps, accumulate); break;
      default:
        if constexpr (kMaxVectors == 4) gemm_columns<A, 4>(g, rows, steps, accumulate);
    }
    vectors -= n;
    g.b += n * kLanes<typename A::Sum> * A::kStep;
    g.c += n * kLanes<typename A::Sum>;
  }
}

// For a handful of rows and many vectors: where the rows of a decode step are A, and keys or features the lanes. As
// many accumulators as hide the latency of a multiplication; A is padded to kFewRowMultiple.
inline constexpr int kFewRowMultiple = 4;

template <class A, int kRows>
inline void gemm_row_block(GemmOperands<A> g, std::int64_t rows, std::int64_t vectors, std::int64_t steps,
                           bool accumulate) {
  const auto columns = [&](auto count) {
    constexpr int kVectors = decltype(count)::kValue;
    for (; vectors >= kVectors; vectors -= kVectors) {
      gemm_columns<A, kVectors, kRows>(g, rows, steps, accumulate);
      g.b += kVectors * kLanes<typename A::Sum> * A::kStep;
      g.c += kVectors * kLanes<typename A::Sum>;
    }
  };
  if constexpr (kRows * 8 <= 4 * kMaxVectors) columns(Constant<8>{});
  if constexpr (kRows * 4 <= 4 * kMaxVectors) columns(Constant<4>{});
  if constexpr (kRows * 4 > 4 * kMaxVectors) columns(Constant<3>{});
  columns(Constant<2>{});
  columns(Constant<1>{});
}

template <class A>
inline void gemm_few_rows(GemmOperands<A> g, std::int64_t rows, std::int64_t vectors, std::int64_t steps,
                          bool accumulate) {
  for (; steps > kMaxSteps; steps -= kMaxSteps, accumulate = true) {
    gemm_few_rows(g, rows, vectors, kMaxSteps, accumulate);
    g.a += kMaxSteps * g.a_step;
    g.b += kMaxSteps * g.b_step;
  }
  if (rows == 1) return gemm_row_block<A, 1>(g, rows, vectors, steps, accumulate);
  if (rows == 2) return gemm_row_block<A, 2>(g, rows, vectors, steps, accumulate);
  gemm_row_block<A, 4>(g, rows, vectors, steps, accumulate);
}

// C[rows][keys] = A[rows][features] B[keys]^T with the features on the lanes: for keys that lie as rows, and few rows,
// as each costs a sum across lanes. Rows of B by pointer; steps is a whole number of vectors, keys as well.
template <class A>
inline void gemm_dots(const typename A::Element* a, std::int64_t a_row, const typename A::Element* const* b,
                      typename A::Sum* c, std::int64_t c_row, std::int64_t rows, std::int64_t keys,
                      std::int64_t steps) {
  constexpr int kKeys = kLanes<typename A::Sum>;
  for (std::int64_t key = 0; key < keys; key += kKeys, b += kKeys) {
    for (std::int64_t r = 0; r < rows; ++r) {
      Vec<typename A::Sum> sum[kKeys];
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) sum[i] = Vec<typename A::Sum>{};
      for (std::int64_t d = 0; d < steps * A::kStep; d += kKeys * A::kStep) {
        const auto x = A::operand(a + r * a_row + d);
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) sum[i] = A::multiply_add(A::operand(b[i] + d), x, sum[i]);
      }
      store(c + r * c_row + key, sums_of_lanes<typename A::Sum>(sum));
    }
  }
}

// A gemm over the pairs that visible(row, lane, i) admits, i counting single products: for tiles that
// hide some pairs and hold a NaN or an infinity, which a weight of zero would not keep out.
template <class A, class Visible>
inline void gemm_where(GemmOperands<A> g, std::int64_t rows, std::int64_t lanes, std::int64_t products,
                       Visible visible) {
  constexpr int kStep = A::kStep;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      for (std::int64_t i = 0; i < products; ++i) {
        if (!visible(r, lane, i)) continue;
        g.c[r * g.c_row + lane] += to_float(g.a[r * g.a_row + i / kStep * g.a_step + i % kStep]) *
                                   to_float(g.b[i / kStep * g.b_step + lane * kStep + i % kStep]);
      }
    }
  }
}

}  // namespace attnx::cpu::ATTNX_ISA
