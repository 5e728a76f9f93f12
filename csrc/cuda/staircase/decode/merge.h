// Sums of warps, and then of blocks, become those of all tokens, in a fixed order.
#pragma once

#include "cuda/staircase/decode/rows.h"

namespace attnx::cuda {

class DecodeMerge {
  const DecodeArguments& args_;
  const DecodePlace& place_;
  float* memory_;  // [warp][row][head_dim], then [warp][row] of (maximum, sum)
  int dim_;

  struct Part {
    const float* sums;   // [rows][head_dim]
    const float2* ends;  // [rows]
    std::int64_t sums_stride, ends_stride;
    int count;
  };

  __device__ float2* ends() const { return reinterpret_cast<float2*>(memory_ + kDecodeWarps * kDecodeRows * dim_); }
  __device__ std::int64_t part(int split) const { return place_.tile * args_.splits + split; }

 public:
  __device__ DecodeMerge(const DecodeArguments& args, const DecodePlace& place, float* memory)
      : args_(args), place_(place), memory_(memory), dim_(int(args.cache.layout.head_dim)) {}

  // A warp leaves its sums in shared memory.
  template <int kHeadDim>
  __device__ void leave(const float (&sums)[kHeadDim / 16][4], const float (&max)[2], const float (&sum)[2]) const {
    const int warp = int(threadIdx.x) / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float* const own = memory_ + warp * kDecodeRows * dim_;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (d * 16 < dim_) own[(2 * t + i % 2) * dim_ + d * 16 + i / 2 * 8 + g] = sums[d][i];
    if (g == 0)
      for (int c = 0; c < 2; ++c) ends()[warp * kDecodeRows + 2 * t + c] = make_float2(max[c], sum[c]);
  }

  __device__ Part of_warps() const { return {memory_, ends(), kDecodeRows * dim_, kDecodeRows, kDecodeWarps}; }
  __device__ Part of_blocks() const {
    return {args_.parts.output + part(0) * kDecodeRows * dim_, args_.parts.sums + part(0) * kDecodeRows,
            kDecodeRows * dim_, kDecodeRows, place_.blocks};
  }

  // This merges a number of a row. All weights are relative to the largest maximum, and the sigmoid's have none.
  __device__ float merged(const Part& from, int row, int channel, float2& end) const {
    end = make_float2(-INFINITY, 0);
    if (args_.softmax)
      for (int i = 0; i < from.count; ++i) end.x = fmaxf(end.x, from.ends[i * from.ends_stride + row].x);
    float x = 0;
    for (int i = 0; i < from.count; ++i) {
      const float2 own = from.ends[i * from.ends_stride + row];
      const float weight = args_.softmax ? exp2_approx(own.x - end.x) : 1;
      end.y = fmaf(weight, own.y, end.y);
      x = fmaf(weight, from.sums[i * from.sums_stride + row * dim_ + channel], x);
    }
    return x;
  }

  // A block leaves what its warps found in global memory. It returns whether it is the last one.
  __device__ bool share() const {
    const Part from = of_warps();
    for (int i = threadIdx.x; i < place_.rows * dim_; i += blockDim.x) {
      float2 end;
      const std::int64_t at = part(place_.split) * kDecodeRows;
      args_.parts.output[at * dim_ + i] = merged(from, i / dim_, i % dim_, end);
      if (i % dim_ == 0) args_.parts.sums[at + i / dim_] = end;
    }
    __threadfence();
    __syncthreads();
    const bool last =
        __syncthreads_or(threadIdx.x == 0 && atomicAdd(args_.parts.finished + place_.tile, 1) == place_.blocks - 1);
    __threadfence();
    return last;
  }

  __device__ void finish(const Part& from) const {
    for (int i = threadIdx.x; i < place_.rows * dim_; i += blockDim.x) {
      const int row = i / dim_, channel = i % dim_, all = place_.row_tile * kDecodeRows + row;
      const int query = args_.heads_on_key_head.divide(all), group = args_.heads_on_key_head.divisor();
      const int head = place_.head_k * group + all - query * group;
      float2 end;
      float x = merged(from, row, channel, end);
      x = !args_.softmax ? x / kDecodeWeightScale : end.y == 0 ? 0 : x / end.y;
      std::uint16_t* const to = rows_of<std::uint16_t>(args_.output, place_.batch, head, query) + channel;
      *to = args_.bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
      if (channel == 0 && args_.softmax && args_.logsumexp.data)
        *rows_of<float>(args_.logsumexp, place_.batch, head, query) =
            end.y == 0 ? -INFINITY : (end.x + log2f(end.y)) * kLn2;
    }
  }
};

}  // namespace attnx::cuda
