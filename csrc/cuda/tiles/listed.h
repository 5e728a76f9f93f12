// Tiles of the blocks that a list names: block-sparse attention.
#pragma once

#include "attnx/params.h"

namespace attnx::cuda {

// Where one list, of one block of queries (or of keys, transposed), stands.
class List {
  const std::int32_t* indices_;
  const float* bias_;
  int count_;

 public:
  __device__ __forceinline__ List(const BlockList& list, int batch, int head, int block)
      : indices_(list.indices + batch * list.indices_batch_stride + head * list.indices_head_stride +
                 block * list.indices_row_stride),
        bias_(list.bias ? list.bias + batch * list.bias_batch_stride + head * list.bias_head_stride +
                              block * list.bias_row_stride
                        : nullptr),
        count_(__ldg(list.counts + batch * list.counts_batch_stride + head * list.counts_head_stride + block)) {}

  __device__ __forceinline__ int count() const { return count_; }
  __device__ __forceinline__ const std::int32_t* entry(int i) const { return indices_ + i; }
  __device__ __forceinline__ int index(int entry) const { return __ldg(indices_ + entry); }
  __device__ __forceinline__ float bias(int entry) const { return bias_ ? __ldg(bias_ + entry) : 0; }
};

// The tiles of kKeys keys in the listed blocks, one, two or four to a block.
template <int kKeys>
class ListedTiles {
  List list_;
  int block_, shift_;  // keys of a block; log2 of its tiles

 public:
  static constexpr bool kHasBias = true;

  __device__ __forceinline__ ListedTiles(const List& list, int block)
      : list_(list), block_(block), shift_((block > kKeys) + (block > 2 * kKeys)) {}

  __device__ __forceinline__ int begin() const { return 0; }
  __device__ __forceinline__ int end() const { return list_.count() << shift_; }
  __device__ __forceinline__ int key(int tile) const {
    return list_.index(tile >> shift_) * block_ + (tile & ((1 << shift_) - 1)) * kKeys;
  }
  __device__ __forceinline__ float bias(int tile) const { return list_.bias(tile >> shift_); }
  __device__ __forceinline__ const std::int32_t* entry(int tile) const { return list_.entry(tile >> shift_); }
};

}  // namespace attnx::cuda
