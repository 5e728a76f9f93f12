// These are products of float32 matrices on tensor cores. A number is the sum of two of TF32's, of 11 bits each, so
// that a product of two is three products of theirs, and one with a number of 16 bits, which TF32 holds, is two (Ootomo
// and Yokota, "Recovering single precision accuracy from Tensor Cores", arXiv 2203.03341). States keep float32's range
// and all but the last of its bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace attnx::cuda {

inline constexpr int kTileRows = 16;

// D = A B + C on one 16x8 tile, of 8 steps (PTX ISA 9.0, section 9.7.14.5.4).
__device__ __forceinline__ void multiply_add_tf32(float (&c)[4], const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// This rounds to TF32, halves away from 0.
__device__ __forceinline__ std::uint32_t round_to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

// These are the parts of some numbers. Those that TF32 holds have but one.
template <int kCount, bool kExact>
struct SplitNumbers {
  std::uint32_t high[kCount], low[kExact ? 1 : kCount];

  __device__ __forceinline__ explicit SplitNumbers(const float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = kExact ? __float_as_uint(x[i]) : round_to_tf32(x[i]);
      if constexpr (!kExact) low[i] = round_to_tf32(x[i] - __uint_as_float(high[i]));
    }
  }
};

// These are the numbers of a warp's tile of kTileRows rows and kBlocks * 8 columns, as in tile.h.
template <int kBlocks>
struct SplitTile {
  float sums[kBlocks][4] = {};

  // This adds A B over the steps, of which there is a multiple of 8. a(row, step) and b(step, column) return numbers;
  // each is exact where it has 16 bits. Blocks from `blocks` on are left out.
  template <bool kExactA, bool kExactB, class A, class B>
  __device__ __forceinline__ void add_product(const A& a, const B& b, int steps, int blocks) {
    const int lane = threadIdx.x % 32, row = lane / 4, step = lane % 4;
#pragma unroll 1
    for (int k = step; k < steps; k += 8) {
      const SplitNumbers<4, kExactA> left({a(row, k), a(row + 8, k), a(row, k + 4), a(row + 8, k + 4)});
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (n >= blocks) break;
        const SplitNumbers<2, kExactB> right({b(k, n * 8 + row), b(k + 4, n * 8 + row)});
        if constexpr (!kExactA) multiply_add_tf32(sums[n], left.low, right.high);
        if constexpr (!kExactB) multiply_add_tf32(sums[n], left.high, right.low);
        multiply_add_tf32(sums[n], left.high, right.high);
      }
    }
  }

  // This calls visit(row, column, number) for the lane's numbers.
  template <class Visit>
  __device__ __forceinline__ void for_each(int blocks, const Visit& visit) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if (n >= blocks) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(lane / 4 + e / 2 * 8, n * 8 + lane % 4 * 2 + e % 2, sums[n][e]);
    }
  }
  // This calls visit(row, column, number, number of the other tile).
  template <class Visit>
  __device__ __forceinline__ void for_each(int blocks, const SplitTile& other, const Visit& visit) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if (n >= blocks) break;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        visit(lane / 4 + e / 2 * 8, n * 8 + lane % 4 * 2 + e % 2, sums[n][e], other.sums[n][e]);
    }
  }
};

// The warps of a block share the tiles of a product of rows x columns, which are multiples of 16 and of 8: this calls
// visit(tile, first row, first column, blocks) for those of the warp.
template <int kBlocks, int kThreads, class Visit>
__device__ __forceinline__ void for_each_split_tile(int rows, int columns, const Visit& visit) {
  const int across = (columns + kBlocks * 8 - 1) / (kBlocks * 8), tiles = rows / kTileRows * across;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < tiles; i += kThreads / 32) {
    const int column = i % across * kBlocks * 8;
    SplitTile<kBlocks> tile;
    visit(tile, i / across * kTileRows, column, min(kBlocks, (columns - column) / 8));
  }
}

// This is a matrix of float32 in shared memory.
struct SharedMatrix {
  float* data;
  int pitch;

  __device__ __forceinline__ float* row(int i) const { return data + i * pitch; }
  __device__ __forceinline__ float& operator()(int i, int j) const { return data[i * pitch + j]; }
};

}  // namespace attnx::cuda
