// These are the rows of queries of a block, in shared memory: as operand of the products with keys, and what turns the
// products into weights.
#pragma once

#include "cuda/common/reduce.h"
#include "cuda/common/sequence.h"
#include "cuda/staircase/decode/fragment.h"
#include "cuda/staircase/decode/memory.h"

namespace attnx::cuda {

// Weights are kept times 2^6, so that products with steps are seldom subnormal, and at most 2^7 times that.
inline constexpr float kDecodeWeightLog2 = 6, kDecodeWeightScale = 64;

// Numbers of either dtype are float16 here, as tensor cores multiply codes as such.
__device__ __forceinline__ float to_float(std::uint16_t bits, bool bfloat16) {
  return bfloat16 ? __uint_as_float(std::uint32_t(bits) << 16) : __half2float(__ushort_as_half(bits));
}

// A warp leaves a tile of 8 rows, of which lane 4g + t has features 2t and 2t + 1 of each 8 of row g, as [32 features]
// [tile][lane] of 4 words. Rows are multiplied by a power of two, so that their largest number is from 32 up to 64:
// times the largest step, 512, it is still a float16. It returns what they are multiples of.
template <int kHeadDim, int kTiles>
__device__ float leave_query(const DecodeArguments& args, const DecodePlace& place, int tile, std::uint32_t to) {
  const int lane = threadIdx.x % 32, t = lane % 4, row = tile * kDecodeRows + lane / 4;
  int head;
  const int query = place.query(args, row, head);
  const std::uint16_t* const from = rows_of<const std::uint16_t>(args.query, place.batch, head, query);
  std::uint32_t x[kHeadDim / 8];
  float highest = 0;
  const auto number = [&](std::uint32_t pair, int e) { return to_float(std::uint16_t(pair >> 16 * e), args.bfloat16); };
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
    x[i] = 0;
    if (row < place.rows && i * 8 < int(args.cache.layout.head_dim))
      x[i] = from[i * 8 + 2 * t] | std::uint32_t(from[i * 8 + 2 * t + 1]) << 16;
    highest = fmaxf(highest, fmaxf(fabsf(number(x[i], 0)), fabsf(number(x[i], 1))));
  }
  highest = max_of_quad(highest);
  const int exponent = min(5 - ((__float_as_int(highest) >> 23) - 127), 126);
  const float factor = __int_as_float((127 + exponent) << 23);
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) x[i] = pack(number(x[i], 0) * factor, number(x[i], 1) * factor, __half());
#pragma unroll
  for (int d = 0; d < kHeadDim / 32; ++d)
    store_shared(to + ((d * kTiles + tile) * 32 + lane) * 16,
                 make_uint4(x[4 * d], x[4 * d + 1], x[4 * d + 2], x[4 * d + 3]));
  return __int_as_float((127 - exponent) << 23);
}

// This is what a row adds to its logits, times log2(e).
__device__ inline float decode_bias(const DecodeArguments& args, const DecodePlace& place, int row) {
  if (args.softmax || row >= place.rows) return 0;
  int head;
  place.query(args, row, head);
  float x = args.bias_value + of_head(args.bias, head);
  if (args.bias_rule == BiasRule::kLength) x -= logf(float(max(place.length, 1)));
  if (args.bias_rule == BiasRule::kRow) x -= logf(float(max(place.end(args, row), 1)));
  return x * kLog2E;
}

// The warps of a block leave its rows.
template <class Memory, int kHeadDim>
__device__ void leave_rows(const DecodeArguments& args, const DecodePlace& place, std::uint32_t memory) {
#pragma unroll 1
  for (int tile = int(threadIdx.x) / 32; tile < Memory::kTiles; tile += kDecodeWarps) {
    const float unit = leave_query<kHeadDim, Memory::kTiles>(args, place, tile, memory + Memory::kQueryAt);
    if (threadIdx.x % 4 != 0) continue;
    const int row = tile * kDecodeRows + int(threadIdx.x) % 32 / 4;
    store_shared(memory + Memory::kScalesAt + row * 8, __float_as_uint(unit * args.scale_log2));
    store_shared(memory + Memory::kScalesAt + row * 8 + 4, __float_as_uint(decode_bias(args, place, row)));
    store_shared(memory + Memory::kEndsAt + row * 4, std::uint32_t(place.end(args, row)));
  }
}

}  // namespace attnx::cuda
