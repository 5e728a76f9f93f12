// What the kernels are passed: the call's parameters and what the launcher derives from them.
#pragma once

#include "attnx/params.h"
#include "cuda/divisor.h"
#include "cuda/tiles/band.h"

namespace attnx::cuda {

inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
inline constexpr int kUnbounded = 1 << 30;  // lengths are below, windows at most

// One sequence of one head, and which of its keys a query sees.
struct Sequence {
  int length_q;
  std::int64_t first_q, first_k;  // rows before it in packed tensors
  Band band;
};

template <class Params>
struct Arguments {
  Params call;
  Divisor group;         // query heads on a key head, in one tile; 1 with lists, which each query head has of its own
  Divisor heads;         // of tiles of rows: those of key, with lists those of query
  Divisor query_blocks;  // tiles along the longest sequence's rows (query, head of the group)
  Divisor key_heads, key_blocks;  // backward: heads, and tiles along the longest sequence's keys
  Divisor splits;                 // forward: shares of the keys
  int left, right;                // the window, at most kUnbounded
  float scale, scale_log2;
  bool deterministic;

  // The forward's partial results by split: [split][tile][row][feature], [tile][row][split].
  float *partial_output, *partial_logsumexp;
  // The backward's, by row tile: [head][row tile][...], with row_tiles to a head; see backward.h and backward_passes.h.
  std::int64_t row_tiles;
  float* offset;          // [row]: what a row's logits get, times log2(e): the sigmoid's bias, or -logsumexp
  float* delta;           // [row]: softmax's rowsum(grad_output * output) - grad_logsumexp
  float* grad_query_sum;  // [element of a thread][thread]: the tile's grad_query / scale, by threads of the main kernel
  float *bias_sum, *slope_sum;  // [warp][row]: sums of grad_logits, and of them times distance; null where not wanted
  int* turns;                   // deterministic: how many tiles of keys have added theirs to grad_query_sum
  int row_heads;                // heads of tiles of rows on a key head
  // Deterministic, with lists, of each entry of query_blocks, laid out as its indices: how many blocks the list of its
  // block of queries has before the block of keys whose entry it is.
  int* list_order;

  __device__ __forceinline__ Sequence sequence(int batch) const {
    const auto length = [&](const std::int32_t* ends, std::int64_t full) {
      return ends ? ends[batch + 1] - ends[batch] : int(full);
    };
    Sequence s;
    s.length_q = length(call.cu_seqlens_q, call.length_q);
    s.first_q = call.cu_seqlens_q ? call.cu_seqlens_q[batch] : 0;
    s.first_k = call.cu_seqlens_k ? call.cu_seqlens_k[batch] : 0;
    const int length_k = length(call.cu_seqlens_k, call.length_k);
    s.band = {length_k, length_k - s.length_q, left, right};
    return s;
  }

  // Where a tile of rows stands among those of its head.
  __device__ __forceinline__ std::int64_t row_tile(int batch, const Sequence& sequence, int query_block,
                                                   int rows_of_tile) const {
    if (!call.cu_seqlens_q) return std::int64_t(batch) * query_blocks.divisor() + query_block;
    return sequence.first_q * group.divisor() / rows_of_tile + batch + query_block;
  }

  // The first query head in a tile of this head.
  __device__ __forceinline__ int query_head(int head) const { return head * group.divisor(); }
  __device__ __forceinline__ int key_head(int head) const {
    return heads.divisor() == call.heads_k ? head : head / int(call.heads_q / call.heads_k);
  }
};

using ForwardArguments = Arguments<ForwardParams>;
using BackwardArguments = Arguments<BackwardParams>;

// The first row of a sequence and head in a tensor.
template <class Element>
__device__ __forceinline__ Element* rows_of(const Tensor& x, int batch, int head, std::int64_t first) {
  return static_cast<Element*>(x.data) + batch * x.batch_stride + head * x.head_stride + first * x.row_stride;
}

__device__ __forceinline__ float of_head(const PerHead& x, int head) {
  return x.data ? static_cast<const float*>(x.data)[head * x.stride] : 0;
}

}  // namespace attnx::cuda
