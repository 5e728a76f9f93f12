// This is the device's view of a call's geometry: one sequence, its rows in tensors, and the numbers of its tiles.
#pragma once

#include "cuda/common/band.h"
#include "cuda/common/geometry.h"

namespace attnx::cuda {

// This is one sequence, and which of its keys a query sees.
struct Sequence {
  int length_q;
  std::int64_t first_q, first_k;  // rows before its own in the tensors
  Band band;
};

__device__ __forceinline__ Sequence sequence_of(const Geometry& g, int batch) {
  const auto length = [&](const std::int32_t* starts, const std::int32_t* ends, std::int64_t full) {
    return starts ? ends[batch] - starts[batch] : int(full);
  };
  Sequence s;
  s.length_q = length(g.cu_seqlens_q, g.cu_seqlens_q + 1, g.length_q);
  s.first_q = g.cu_seqlens_q ? g.cu_seqlens_q[batch] : 0;
  s.first_k = g.key_starts ? g.key_starts[batch] : 0;
  const int length_k = length(g.key_starts, g.key_ends, g.length_k);
  s.band = {length_k, length_k - s.length_q + g.position_offset, g.left, g.right};
  return s;
}

// This says where a tile of rows stands among those of its head.
__device__ __forceinline__ std::int64_t row_tile_of(const Geometry& g, int batch, const Sequence& sequence,
                                                    int query_block, int rows_of_tile) {
  if (!g.cu_seqlens_q) return std::int64_t(batch) * g.query_blocks.divisor() + query_block;
  return sequence.first_q * g.group.divisor() / rows_of_tile + batch * g.tiles_of_block + query_block;
}

// These return the first query head in the tiles of this head, and the key head that they see.
__device__ __forceinline__ int query_head_of(const Geometry& g, int head) { return head * g.group.divisor(); }
__device__ __forceinline__ int key_head_of(const Geometry& g, int head) {
  return g.heads.divisor() == g.heads_k ? head : head / int(g.heads_q / g.heads_k);
}

// This returns the first row of a sequence and head in a tensor.
template <class Element>
__device__ __forceinline__ Element* rows_of(const Tensor& x, int batch, int head, std::int64_t first) {
  return static_cast<Element*>(x.data) + batch * x.batch_stride + head * x.head_stride + first * x.row_stride;
}

__device__ __forceinline__ float of_head(const PerHead& x, int head) {
  return x.data ? static_cast<const float*>(x.data)[head * x.stride] : 0;
}

}  // namespace attnx::cuda
