// These are the tiles of the blocks that a list names: they serve block-sparse attention.
#pragma once

#include "attnx/params.h"
#include "cuda/common/ptx.h"
#include "cuda/tiles/band.h"

namespace attnx::cuda {

// This says where one list stands: that of one block of queries or, transposed, of keys. The numbers of its entries
// share an offset, which takes fewer registers than their addresses.
class List {
  const BlockList& lists_;
  const std::int32_t* indices_;
  std::int64_t numbers_;
  int count_;

  __device__ __forceinline__ float number(const float* of_all, int entry, float otherwise) const {
    return of_all ? __ldg(of_all + numbers_ + entry) : otherwise;
  }

 public:
  __device__ __forceinline__ List(const BlockList& lists, int batch, int head, int block)
      : lists_(lists),
        indices_(lists.indices + batch * lists.indices_batch_stride + head * lists.indices_head_stride +
                 block * lists.indices_row_stride),
        numbers_(batch * lists.bias_batch_stride + head * lists.bias_head_stride + block * lists.bias_row_stride),
        count_(min(__ldg(lists.counts + batch * lists.counts_batch_stride + head * lists.counts_head_stride + block),
                   int(lists.width))) {}

  __device__ __forceinline__ int count() const { return count_; }
  __device__ __forceinline__ const std::int32_t* entry(int i) const { return indices_ + i; }
  __device__ __forceinline__ int index(int entry) const { return __ldg(indices_ + entry); }
  // This drops the last entries that are not below `end`.
  __device__ __forceinline__ void drop_from(int end) {
    while (count_ > 0 && index(count_ - 1) >= end) --count_;
  }
  __device__ __forceinline__ float bias(int entry) const { return number(lists_.bias, entry, 0); }
  __device__ __forceinline__ float divisor(int entry) const { return number(lists_.divisor, entry, 1); }
};

// These are the tiles of kSize keys, or rows, in the listed blocks: one, two or four to a block.
template <int kSize>
class ListedTiles {
  List list_;
  int block_, shift_;  // keys of a block; log2 of its tiles
  unsigned last_;      // no block is taken beyond this one, whatever the list says

 public:
  __device__ __forceinline__ ListedTiles(const List& list, int block, unsigned last = ~0u)
      : list_(list), block_(block), shift_((block > kSize) + (block > 2 * kSize)), last_(last) {}

  __device__ __forceinline__ int begin() const { return 0; }
  __device__ __forceinline__ int end() const { return list_.count() << shift_; }
  __device__ __forceinline__ int first(int tile) const {
    return int(min(unsigned(list_.index(tile >> shift_)), last_)) * block_ + (tile & ((1 << shift_) - 1)) * kSize;
  }
  __device__ __forceinline__ float bias(int tile) const { return list_.bias(tile >> shift_); }
  __device__ __forceinline__ float divisor(int tile) const { return list_.divisor(tile >> shift_); }
  __device__ __forceinline__ const std::int32_t* entry(int tile) const { return list_.entry(tile >> shift_); }
};

// These are tiles of keys. What a bias of -inf hides lies past the end of every sequence, where no row sees it.
template <int kSize>
class ListedKeyTiles : public ListedTiles<kSize> {
  using Base = ListedTiles<kSize>;
  static constexpr int kPastEnd = 1 << 30;

 public:
  using Base::Base;

  __device__ __forceinline__ int first(int tile) const {
    return Base::bias(tile) == -INFINITY ? kPastEnd : Base::first(tile);
  }
  __device__ __forceinline__ float bias(int tile) const {
    const float bias = Base::bias(tile);
    return bias == -INFINITY ? 0 : bias;
  }
};

// This is the tiles policy.
struct Listed {
  // Each query head has lists, and so tiles of rows, of its own.
  static constexpr bool kPerHead = true;
  // The keys of a tile are read from memory, ahead of their use.
  static constexpr bool kFromMemory = true;
  static constexpr bool kHasPlaces = false;
  static constexpr bool kHasBias = true;
  static constexpr bool kHasAddend = true;

  struct ForwardParameters {
    BlockList key_blocks;  // of each block of queries
    int block_q, block_k;  // rows and keys of a block
  };
  struct BackwardParameters {
    BlockList query_blocks;  // of each block of keys
    int block_q, block_k;
    // In deterministic order this tells of each entry of query_blocks, laid out as its indices, how many blocks the
    // list of its block of queries has before the block of keys whose entry it is.
    const int* order;
    Tensor grad_key_addend, grad_value_addend;
  };
  static ForwardParameters parameters(const ForwardParams& p) { return {p.key_blocks, int(p.block_q), int(p.block_k)}; }
  static BackwardParameters parameters(const BackwardParams& p, const int* order) {
    return {p.query_blocks, int(p.block_q), int(p.block_k), order, p.grad_key_addend, p.grad_value_addend};
  }

  template <class Tile, class Args, class Place>
  static __device__ __forceinline__ ListedKeyTiles<Tile::kN> keys(const Args& args, const Place& place) {
    const auto& lists = args.tiles;
    return {List(lists.key_blocks, place.batch, place.head, place.row_begin / lists.block_q), lists.block_k};
  }

  template <class Tile, class Args, class Sequence>
  static __device__ __forceinline__ ListedTiles<Tile::kM> rows(const Args& args, const Sequence& sequence, int batch,
                                                               int query_head, int key_begin) {
    const auto& lists = args.tiles;
    List list(lists.query_blocks, batch, query_head, key_begin / lists.block_k);
    const int blocks = (sequence.length_q + lists.block_q - 1) / lists.block_q;
    // Packed sequences of several lengths may share lists, which ascend then.
    if (args.cu_seqlens_q) list.drop_from(blocks);
    return {list, lists.block_q, unsigned(max(blocks - 1, 0))};
  }

  // This counts as for a band, but here the list of the block of rows names the blocks before.
  template <int kKeys, class Args, int kRows>
  static __device__ __forceinline__ int before(const Args& args, const Band&, int, int key_begin,
                                               const ListedTiles<kRows>& tiles, int tile) {
    const auto& lists = args.tiles;
    const int per_block = fresh(lists.block_k) / kKeys;  // it is not kept in a register through the loop
    return lists.order[tiles.entry(tile) - lists.query_blocks.indices] * per_block + key_begin / kKeys % per_block;
  }
};

}  // namespace attnx::cuda
