// These turn products with keys into weights. The maximum of a row is a whole number, so that weights relative to one
// become those relative to another by a power of two, which is exact.
#pragma once

#include "cuda/score/sigmoid_formulas.h"
#include "cuda/staircase/decode/rows.h"

namespace attnx::cuda {

__device__ __forceinline__ float2 load_shared_pair(std::uint32_t from) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
  return x;
}

// Lane 4g + t has products of tokens 8i + g with rows 2t and 2t + 1 of a tile, and these maxima of its warp.
template <class Memory>
struct DecodeWeights {
  std::uint32_t memory;
  int seen_by_all;  // this many tokens are seen by all rows
  bool softmax;

  static __device__ __forceinline__ int warp() { return int(threadIdx.x) / 32; }
  static __device__ __forceinline__ int row(int tile) { return tile * kDecodeRows + int(threadIdx.x) % 4 * 2; }
  __device__ __forceinline__ std::uint32_t max_of(int row) const {
    return memory + Memory::kMaxAt + (warp() * Memory::kRows + row) * 4;
  }
  __device__ __forceinline__ std::uint32_t maxima(int parity, int warp, int row) const {
    return memory + Memory::kMaximaAt + ((parity * kDecodeWarps + warp) * Memory::kRows + row) * 4;
  }

  __device__ __forceinline__ void start() const {
#pragma unroll
    for (int row = int(threadIdx.x) % 32; row < Memory::kRows; row += 32)
      store_shared(max_of(row), __float_as_uint(-0x1p100f));
  }

  // These are products of tokens first + 16 m + 8 i + g. It returns whether the warp's maxima have risen.
  template <int kM>
  __device__ __forceinline__ bool weigh(float (&s)[kM][4], int tile, int first, int parity) const {
    const int g = threadIdx.x % 32 / 4;
    const uint4 scales = load_shared(memory + Memory::kScalesAt + row(tile) * 8);
    const float multiplier[2] = {__uint_as_float(scales.x), __uint_as_float(scales.z)};
    const float bias[2] = {__uint_as_float(scales.y), __uint_as_float(scales.w)};
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][i] = fmaf(s[m][i], multiplier[i % 2], bias[i % 2]);
    if (first + kM * 16 > seen_by_all) {
      const int ends[2] = {int(load_shared_word(memory + Memory::kEndsAt + row(tile) * 4)),
                           int(load_shared_word(memory + Memory::kEndsAt + row(tile) * 4 + 4))};
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + m * 16 + i / 2 * 8 + g >= ends[i % 2]) s[m][i] = -INFINITY;
    }
    if (!softmax) {
      constexpr float kUnit = 1 / kDecodeWeightScale;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][i] = reciprocal_approx(fmaf(exp2_approx(-s[m][i]), kUnit, kUnit));
      return false;
    }
    float highest[2] = {s[0][0], s[0][1]};
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) highest[i % 2] = fmaxf(highest[i % 2], s[m][i]);
    // Maxima rise in the first turns and seldom later, so that most turns reduce none.
    const float2 before = load_shared_pair(max_of(row(tile)));
    float own[2] = {before.x, before.y};
    const bool risen =
        __any_sync(~0u, highest[0] > before.x + kDecodeWeightLog2 || highest[1] > before.y + kDecodeWeightLog2);
    if (risen) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) highest[c] = fmaxf(highest[c], __shfl_xor_sync(~0u, highest[c], step));
        own[c] = fmaxf(own[c], ceilf(highest[c]) - kDecodeWeightLog2);
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][i] = exp2_approx(s[m][i] - own[i % 2]);
    if (g == 0) {
      store_shared(maxima(parity, warp(), row(tile)), __float_as_uint(own[0]));
      store_shared(maxima(parity, warp(), row(tile)) + 4, __float_as_uint(own[1]));
    }
    return risen;
  }

  // Each warp tells the others whether its maxima have risen, and reads whether any has.
  __device__ __forceinline__ void tell(bool risen, int parity) const {
    if (threadIdx.x % 32 == 0) store_shared(memory + Memory::kRisenAt + (parity * kDecodeWarps + warp()) * 4, risen);
  }
  __device__ __forceinline__ bool risen(int parity) const {
    const uint4 x = load_shared(memory + Memory::kRisenAt + parity * kDecodeWarps * 4);
    return (x.x | x.y | x.z | x.w) != 0;
  }

  // Maxima become the largest of those of the warps that had tokens. It returns what sums of a tile are multiplied
  // with.
  __device__ __forceinline__ float highest(int parity, int warps, int row) const {
    float x = -INFINITY;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) x = fmaxf(x, __uint_as_float(load_shared_word(maxima(parity, w, row))));
    return x;
  }
  __device__ __forceinline__ float2 raise(int parity, int warps, int tile) const {
    const float2 before = load_shared_pair(max_of(row(tile)));
    const float2 after = {highest(parity, warps, row(tile)), highest(parity, warps, row(tile) + 1)};
    __syncwarp();
    if (threadIdx.x % 32 < 4) {
      store_shared(max_of(row(tile)), __float_as_uint(after.x));
      store_shared(max_of(row(tile)) + 4, __float_as_uint(after.y));
    }
    __syncwarp();
    return {exp2_approx(before.x - after.x), exp2_approx(before.y - after.y)};
  }
  // Weights of a warp's tokens are multiplied with this, twice, for row g of a tile.
  __device__ __forceinline__ std::uint32_t factor(int parity, int warps, int warp, int tile) const {
    const int row = tile * kDecodeRows + int(threadIdx.x) % 32 / 4;
    const float own = __uint_as_float(load_shared_word(maxima(parity, warp, row)));
    const float x = exp2_approx(own - highest(parity, warps, row));
    return pack(x, x, __half());
  }
};

}  // namespace attnx::cuda
