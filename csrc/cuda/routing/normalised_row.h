// A warp normalises a row over its features, as LayerNorm does without scale and bias.
#pragma once

#include "attnx/params.h"

namespace attnx::cuda {

inline constexpr int kPerLane = kMaxHeadDim / 32;  // features of a row that a lane has: lane, lane + 32, ...

template <class Input>
__device__ __forceinline__ void load_row(float (&x)[kPerLane], const Input* from, int features, int lane) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = lane + i * 32 < features ? float(from[lane + i * 32]) : 0.0f;
}

__device__ __forceinline__ void normalise(float (&x)[kPerLane], int features, int lane) {
  const auto mean_of = [&](auto term) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum += lane + i * 32 < features ? term(x[i]) : 0.0f;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    return sum / float(features);
  };
  const float mean = mean_of([](float v) { return v; });
  const float variance = mean_of([&](float v) { return (v - mean) * (v - mean); });
  const float factor = 1 / sqrtf(variance + 1e-5f);
#pragma unroll
  for (float& v : x) v = (v - mean) * factor;
}

}  // namespace attnx::cuda
