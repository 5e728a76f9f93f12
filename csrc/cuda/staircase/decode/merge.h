// Sums of a block, or of all blocks that share rows, become the output, in a fixed order.
#pragma once

#include "cuda/staircase/decode/rows.h"

namespace attnx::cuda {

template <class Memory>
class DecodeMerge {
  const DecodeArguments& args_;
  const DecodePlace& place_;
  float* memory_;
  int dim_;

  struct Parts {
    const float* sums;   // [part][row][head_dim]
    const float2* ends;  // [part][row] of (maximum, sum of weights)
    int count;
  };

  __device__ Parts own() const {
    return {memory_ + Memory::kSumsAt / 4, reinterpret_cast<const float2*>(memory_ + Memory::kPartAt / 4), 1};
  }
  __device__ Parts of_block(int split) const {
    const std::int64_t rows = (place_.number * args_.splits + split) * Memory::kRows;
    return {args_.parts.output + rows * dim_, args_.parts.sums + rows, place_.blocks};
  }

  // A warp finds what the sums of a row count, relative to the maximum of all parts. The sigmoid has no maxima: they
  // are alike.
  __device__ void finish_row(const Parts& from, int row, float2* to) const {
    float max = -INFINITY, sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < from.count; i += 32) max = fmaxf(max, from.ends[i * Memory::kRows + row].x);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < from.count; i += 32) {
      const float2 own = from.ends[i * Memory::kRows + row];
      sum = fmaf(exp2_approx(own.x - max), own.y, sum);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 != 0) return;
    to[row] = make_float2(max, !args_.softmax ? 1 / kDecodeWeightScale : sum == 0 ? 0 : 1 / sum);
    if (!args_.softmax || !args_.logsumexp.data) return;
    int head;
    const int query = place_.query(args_, row, head);
    *rows_of<float>(args_.logsumexp, place_.batch, head, query) = sum == 0 ? -INFINITY : (max + log2f(sum)) * kLn2;
  }

  __device__ void finish(const Parts& from) const {
    float2* const of_row = reinterpret_cast<float2*>(memory_ + Memory::kScalesAt / 4);
#pragma unroll 1
    for (int row = int(threadIdx.x) / 32; row < place_.rows; row += kDecodeWarps) finish_row(from, row, of_row);
    __syncthreads();
    const std::uint32_t chunks = dim_ / 4;
#pragma unroll 1
    for (std::uint32_t i = threadIdx.x; i < place_.rows * chunks; i += blockDim.x) {
      const int row = i / chunks, channel = i % chunks * 4;
      float x[4] = {};
#pragma unroll 8
      for (int part = 0; part < from.count; ++part) {
        const float weight = exp2_approx(from.ends[part * Memory::kRows + row].x - of_row[row].x);
        const float4 sums =
            *reinterpret_cast<const float4*>(from.sums + (std::int64_t(part) * Memory::kRows + row) * dim_ + channel);
        x[0] = fmaf(weight, sums.x, x[0]), x[1] = fmaf(weight, sums.y, x[1]);
        x[2] = fmaf(weight, sums.z, x[2]), x[3] = fmaf(weight, sums.w, x[3]);
      }
      int head;
      const int query = place_.query(args_, row, head);
      std::uint16_t* const to = rows_of<std::uint16_t>(args_.output, place_.batch, head, query) + channel;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float y = x[c] * of_row[row].y;
        to[c] = args_.bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(y)) : __half_as_ushort(__float2half_rn(y));
      }
    }
  }

  // A block leaves its sums in global memory. It returns whether it is the last one.
  __device__ bool share() const {
    const Parts from = own(), to = of_block(place_.split);
#pragma unroll 1
    for (int i = threadIdx.x; i < place_.rows * dim_ / 4; i += blockDim.x)
      reinterpret_cast<float4*>(const_cast<float*>(to.sums))[i] = reinterpret_cast<const float4*>(from.sums)[i];
#pragma unroll 1
    for (int i = threadIdx.x; i < place_.rows; i += blockDim.x) const_cast<float2*>(to.ends)[i] = from.ends[i];
    __threadfence();
    __syncthreads();
    const bool last =
        __syncthreads_or(threadIdx.x == 0 && atomicAdd(args_.parts.finished + place_.number, 1) == place_.blocks - 1);
    __threadfence();
    return last;
  }

 public:
  __device__ DecodeMerge(const DecodeArguments& args, const DecodePlace& place, float* memory)
      : args_(args), place_(place), memory_(memory), dim_(int(args.cache.layout.head_dim)) {}

  __device__ void run() const {
    if (place_.blocks > 1 && !share()) return;
    finish(place_.blocks > 1 ? of_block(0) : own());
  }
};

}  // namespace attnx::cuda
