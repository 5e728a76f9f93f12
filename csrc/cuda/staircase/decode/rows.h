// These are the rows of queries of a block: as operand of the products with keys, and what turns their products into
// weights. Lane 4g + t has row g of the operand, and rows 2t and 2t + 1 of the sums.
#pragma once

#include "cuda/common/reduce.h"
#include "cuda/common/sequence.h"
#include "cuda/score/sigmoid_formulas.h"
#include "cuda/staircase/decode/fragment.h"
#include "cuda/staircase/decode/place.h"

namespace attnx::cuda {

// Numbers of either dtype are float16 here, as tensor cores multiply codes as such.
__device__ __forceinline__ float to_float(std::uint16_t bits, bool bfloat16) {
  return bfloat16 ? __uint_as_float(std::uint32_t(bits) << 16) : __half2float(__ushort_as_half(bits));
}

// Rows are multiplied by a power of two, so that their largest number is from 32 up to 64: times the largest step, 512,
// it is still a float16.
template <int kHeadDim>
struct QueryOperand {
  std::uint32_t x[kHeadDim / 8];  // of features 8i + 2t and 8i + 2t + 1
  float unit;                     // what they are multiples of

  __device__ __forceinline__ QueryOperand(const DecodeArguments& args, const DecodePlace& place) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row = place.row_tile * kDecodeRows + g, query = args.heads_on_key_head.divide(row);
    const int group = args.heads_on_key_head.divisor();
    const std::uint16_t* const from =
        rows_of<const std::uint16_t>(args.query, place.batch, place.head_k * group + row - query * group, query);
    const bool present = g < place.rows;
    float highest = 0;
    const auto number = [&](std::uint32_t pair, int e) {
      return to_float(std::uint16_t(pair >> 16 * e), args.bfloat16);
    };
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      x[i] = 0;
      if (present && i * 8 < int(args.cache.layout.head_dim))
        x[i] = from[i * 8 + 2 * t] | std::uint32_t(from[i * 8 + 2 * t + 1]) << 16;
      highest = fmaxf(highest, fmaxf(fabsf(number(x[i], 0)), fabsf(number(x[i], 1))));
    }
    highest = max_of_quad(highest);
    const int exponent = min(5 - ((__float_as_int(highest) >> 23) - 127), 126);
    const float factor = __int_as_float((127 + exponent) << 23);
    unit = __int_as_float((127 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) x[i] = pack(number(x[i], 0) * factor, number(x[i], 1) * factor, __half());
  }
};

// Weights are kept times 2^6, so that products with steps are seldom subnormal, and at most 2^15.
inline constexpr float kDecodeWeightLog2 = 6, kDecodeWeightScale = 64;

// These are two rows of a lane's sums.
class DecodeRows {
  float multiplier_[2], bias_[2];
  int end_[2], seen_by_all_;
  bool softmax_;

 public:
  float max[2], sum[2] = {};  // the maximum less kDecodeWeightLog2; the lane's part of the sum

  __device__ __forceinline__ DecodeRows(const DecodeArguments& args, const DecodePlace& place, float unit)
      : seen_by_all_(place.seen_by_all(args.causal)), softmax_(args.softmax) {
    const int t = threadIdx.x % 4, group = args.heads_on_key_head.divisor();
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = place.row_tile * kDecodeRows + 2 * t + c, query = args.heads_on_key_head.divide(row);
      multiplier_[c] = __shfl_sync(~0u, unit, (2 * t + c) * 4) * args.scale_log2;
      end_[c] = args.causal ? min(place.length, query + 1 + place.length - place.length_q) : place.length;
      max[c] = -0x1p100f;
      bias_[c] = 0;
      if (softmax_ || 2 * t + c >= place.rows) continue;
      float x = args.bias_value + of_head(args.bias, place.head_k * group + row - query * group);
      if (args.bias_rule == BiasRule::kLength) x -= logf(float(::max(place.length, 1)));
      if (args.bias_rule == BiasRule::kRow) x -= logf(float(::max(end_[c], 1)));
      bias_[c] = x * kLog2E;
    }
  }

  // This turns products, of tokens first + 16 m + 8 i + g, into weights. It returns whether maxima have risen, and then
  // what sums before are multiplied with.
  template <int kM>
  __device__ __forceinline__ bool weigh(float (&s)[kM][4], int first, float (&rescale)[2]) {
    const int g = threadIdx.x % 32 / 4;
    const bool masked = first + kM * 16 > seen_by_all_;
    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[m][i] = fmaf(s[m][i], multiplier_[i % 2], bias_[i % 2]);
        if (masked && first + m * 16 + i / 2 * 8 + g >= end_[i % 2]) s[m][i] = -INFINITY;
        highest[i % 2] = fmaxf(highest[i % 2], s[m][i]);
      }
    if (!softmax_) {
      constexpr float kUnit = 1 / kDecodeWeightScale;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][i] = reciprocal_approx(fmaf(exp2_approx(-s[m][i]), kUnit, kUnit));
      return false;
    }
    bool risen = false;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) highest[c] = fmaxf(highest[c], __shfl_xor_sync(~0u, highest[c], step));
      const float before = max[c];
      max[c] = fmaxf(before, highest[c] - kDecodeWeightLog2);
      rescale[c] = exp2_approx(before - max[c]);
      sum[c] *= rescale[c];
      risen |= before != max[c];
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[m][i] = exp2_approx(s[m][i] - max[i % 2]);
        sum[i % 2] += s[m][i];
      }
    return __any_sync(~0u, risen);
  }
};

}  // namespace attnx::cuda
