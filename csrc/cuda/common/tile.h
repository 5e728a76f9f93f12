// These are tiles of 16-bit rows in shared memory, as the tensor cores' operands, and the product of one warp on them.
#pragma once

#include "ptx.h"

namespace attnx::cuda {

// A tile has kRows rows of kFeatures 16-bit elements. Chunks of 16 bytes are swizzled, chunk ^ f(row), so that eight
// rows of one column of chunks, which ldmatrix and the fragments' stores touch at once, lie in different banks.
template <int kRows_, int kFeatures_>
struct SharedTile {
  static constexpr int kRows = kRows_, kFeatures = kFeatures_;
  static constexpr int kPitch = kFeatures * 2, kBytes = kRows * kPitch, kChunks = kFeatures / 8;
  static_assert(kFeatures % 32 == 0 && kRows % 16 == 0);
  static constexpr int kLanes = kChunks & -kChunks;  // threads that copy a row together: a power of two
  // Rows of whole 128-byte lines meet in the same banks every row; others, which are odd multiples of 64 bytes, meet
  // every second row.
  static constexpr int kMask = kFeatures % 64 == 0 ? 7 : 3, kShift = kFeatures % 64 == 0 ? 0 : 1;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kPitch + (chunk ^ (row >> kShift & kMask)) * 16;
  }
};

// This says where a lane's 8x8 matrices lie, for one of the two orders in which the operands of mma want them: rows
// that differ by 8 are in lanes 8-15 (kAcross false), or in lanes 16-31.
template <class Tile, bool kAcross>
class Matrices {
  std::uint32_t row_, chunk_;  // address of the lane's row; its chunk, swizzled, times 16

 public:
  // The matrices begin with a row and a feature, which are multiples of 16. The feature shares no bit with those of
  // at(), because XOR joins them.
  __device__ __forceinline__ Matrices(std::uint32_t tile, int lane, int row, int feature) {
    row += kAcross ? (lane & 7) | (lane >> 1 & 8) : lane & 15;
    const int chunk = feature / 8, next = kAcross ? lane >> 3 & 1 : lane >> 4;
    row_ = tile + row * Tile::kPitch + (chunk & ~Tile::kMask) * 16;
    chunk_ = ((chunk & Tile::kMask) ^ next ^ (row >> Tile::kShift & Tile::kMask)) * 16;
  }

  // This returns the lane's address of the 16x16 elements from there on.
  __device__ __forceinline__ std::uint32_t at(int row, int feature) const {
    const int chunk = feature / 8;
    return row_ + row * Tile::kPitch + ((chunk & Tile::kMask) * 16 ^ chunk_) + (chunk & ~Tile::kMask) * 16;
  }
};

// Operand A has rows m and columns k: it is stored with m as rows, or with k as rows.
template <class Tile>
struct OperandA : Matrices<Tile, false> {
  __device__ __forceinline__ OperandA(std::uint32_t tile, int lane, int row = 0)
      : Matrices<Tile, false>(tile, lane, row, 0) {}
  __device__ __forceinline__ void load(std::uint32_t (&x)[4], int m, int k) const { load_matrices(x, this->at(m, k)); }
};
template <class Tile>
struct TransposedA : Matrices<Tile, true> {
  __device__ __forceinline__ TransposedA(std::uint32_t tile, int lane, int feature = 0)
      : Matrices<Tile, true>(tile, lane, 0, feature) {}
  __device__ __forceinline__ void load(std::uint32_t (&x)[4], int m, int k) const {
    load_matrices_transposed(x, this->at(k, m));
  }
};
// Operand B has 16 columns n: it is stored with n as rows, or with k as rows. In the latter kStride warps take turns at
// blocks of 16 columns, and `feature` is the warp's first.
template <class Tile>
struct OperandB : Matrices<Tile, true> {
  __device__ __forceinline__ OperandB(std::uint32_t tile, int lane, int row = 0)
      : Matrices<Tile, true>(tile, lane, row, 0) {}
  __device__ __forceinline__ void load(std::uint32_t (&x)[4], int n, int k) const { load_matrices(x, this->at(n, k)); }
};
template <class Tile, int kStride = 1>
struct TransposedB : Matrices<Tile, false> {
  static_assert(kStride * 2 <= Tile::kMask + 1);
  __device__ __forceinline__ TransposedB(std::uint32_t tile, int lane, int feature = 0)
      : Matrices<Tile, false>(tile, lane, 0, feature) {}
  __device__ __forceinline__ void load(std::uint32_t (&x)[4], int n, int k) const {
    load_matrices_transposed(x, this->at(k, n * kStride));
  }
};

// These are a warp's float32 sums over kM x kN elements: [block of 16 rows][block of 8 columns][element]. Lane l holds
// rows l / 4 (elements 0, 1) and l / 4 + 8 (elements 2, 3) and columns l % 4 * 2 and the next.
template <int kM, int kN>
using Accumulators = float[kM / 16][kN / 8][4];

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&x)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n][e] = 0;
}

template <int kM, int kN>
__device__ __forceinline__ void scale(float (&x)[kM][kN][4], float factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[m][n][e] *= factor;
}

// This computes c += A B over kK. A is an operand above, or anything that loads the 16x16 block at (m, k).
template <class Input, int kK, class A, class B, int kM, int kN>
__device__ __forceinline__ void multiply(float (&c)[kM][kN][4], const A& a, const B& b) {
#pragma unroll
  for (int k = 0; k < kK; k += 16) {
    std::uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) a.load(left[m], m * 16, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      std::uint32_t right[4];
      b.load(right, n * 8, k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add(c[m][n], left[m], right[0], right[1], Input());
        multiply_add(c[m][n + 1], left[m], right[2], right[3], Input());
      }
    }
  }
}

}  // namespace attnx::cuda
