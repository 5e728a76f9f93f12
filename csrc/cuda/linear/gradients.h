// The kernels of linear attention's gradients share this.
#pragma once

#include "cuda/linear/operands.h"

namespace attnx::cuda {

// A kernel needs so much shared memory for three tiles, and for numbers behind them: a state's last column, and two of
// each row.
template <int kDim>
inline constexpr int kGradientBytes = 3 * LinearTile<kDim>::kBytes + (kDim + 2 * kLinearRows) * int(sizeof(float));

// This is the dot product of the thread's row in two tiles, by all threads of the row.
template <class Input, class Tile, int kThreads>
__device__ __forceinline__ float dot_rows(std::uint32_t left, std::uint32_t right) {
  constexpr int kParts = kThreads / Tile::kRows;
  const int row = threadIdx.x / kParts;
  float sum = 0;
#pragma unroll 2
  for (int chunk = threadIdx.x % kParts; chunk < Tile::kChunks; chunk += kParts) {
    const uint4 x = load_shared(left + Tile::offset(row, chunk)), y = load_shared(right + Tile::offset(row, chunk));
    const std::uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = unpack(xs[i], Input()), b = unpack(ys[i], Input());
      sum = fmaf(a.y, b.y, fmaf(a.x, b.x, sum));
    }
  }
  return sum_of_parts<kParts>(sum);
}

// These are some columns of a warp's accumulators of 16 rows; the first is known at compile time.
template <int kColumns, int kN>
__device__ __forceinline__ float (&columns_of(float (&x)[1][kN][4], int first))[1][kColumns / 8][4] {
  return *reinterpret_cast<float (*)[1][kColumns / 8][4]>(&x[0][first / 8]);
}

// The gradient of phi of a warp's 16 rows, times a factor a row, becomes that of the rows. phi of them lies in a tile.
template <class Input, class Tile, int kN>
__device__ __forceinline__ void differentiate_features(float (&gradient)[1][kN][4], std::uint32_t tile, int row,
                                                       FeatureMap map, const float (&factor)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto for_each = [&](const auto& visit) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float2 phi =
            unpack(load_shared_word(tile + Tile::offset(row + half * 8 + lane / 4, n) + lane % 4 * 4), Input());
        visit(gradient[0][n][half * 2], phi.x);
        visit(gradient[0][n][half * 2 + 1], phi.y);
      }
    };
    if (map == FeatureMap::kSoftmax) {
      float dot = 0;
      for_each([&](float x, float phi) { dot = fmaf(x, phi, dot); });
      dot = sum_of_quad(dot);
      for_each([&](float& x, float phi) { x = phi * (x - dot) * factor[half]; });
    } else if (map == FeatureMap::kElu) {  // e^x is phi below 0
      for_each([&](float& x, float phi) { x *= fminf(phi, 1.0f) * factor[half]; });
    } else {
      for_each([&](float& x, float phi) { x = phi > 0 ? x * factor[half] : 0.0f; });
    }
  }
}

// This writes a warp's accumulators as rows [row, end) of float32.
template <int kN>
__device__ __forceinline__ void store_sums(const float (&x)[1][kN][4], float* to, std::int64_t row_stride, int row,
                                           int end, int features) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = row + half * 8 + lane / 4;
    if (own >= end) continue;
    float* const first = to + own * row_stride + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (n * 8 + lane % 4 * 2 + e < features) first[n * 8 + e] = x[0][n][half * 2 + e];
  }
}

}  // namespace attnx::cuda
