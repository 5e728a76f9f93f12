// This moves rows that lie at a fixed stride in global memory to and from tiles in shared memory.
#pragma once

#include "cuda/common/sequence.h"
#include "cuda/common/tile.h"

namespace attnx::cuda {

// These are the rows of one head.
template <class Element>
struct StridedRows {
  Element* first;
  std::int64_t row_stride;

  __device__ __forceinline__ Element* at(int row) const { return first + row * row_stride; }
  // This returns the row `step` rows after `row`, which is at `from`.
  __device__ __forceinline__ Element* after(Element* from, int, int step) const { return from + step * row_stride; }
};

template <class Element>
__device__ __forceinline__ StridedRows<Element> fresh(const StridedRows<Element>& rows) {
  return {fresh(rows.first), rows.row_stride};
}

// These are the rows of the query heads that share a key head, in the order (query, head).
template <class Element>
struct GroupedRows {
  Element* first;
  std::int64_t row_stride, head_stride;
  Divisor group;

  __device__ __forceinline__ Element* at(int row) const {
    const int query = group.divide(row);
    return first + query * row_stride + (row - query * group.divisor()) * head_stride;
  }
  __device__ __forceinline__ Element* after(Element*, int row, int step) const { return at(row + step); }
};

// The threads of a block share the 16-byte chunks of a tile: neighbours take neighbours in a row.
template <class Tile, int kThreads>
struct Chunks {
  static constexpr int kLanes = Tile::kLanes, kRowStep = kThreads / kLanes;
  static_assert(Tile::kRows % kRowStep == 0);
};

// This starts copying rows [row, end) of `features` elements each to the tile; the rest of the tile becomes 0. Rows
// that are not kAligned need not lie on 16 bytes, nor be a multiple of them: they are copied one element at a time.
template <bool kAligned, class Tile, int kThreads, class Rows>
__device__ __forceinline__ void load_tile(std::uint32_t tile, const Rows& rows, int row, int end, int features) {
  using Plan = Chunks<Tile, kThreads>;
  const int thread = kAligned ? int(threadIdx.x) : fresh(threadIdx.x);
  if constexpr (kAligned) {
    const int in_tile = thread / Plan::kLanes, lane = thread % Plan::kLanes;
    auto* from = rows.at(row + in_tile);
    const int count = end - row - in_tile;  // rows from the thread's first on
#pragma unroll
    for (int r = 0; r < Tile::kRows; r += Plan::kRowStep) {
      if (r > 0) from = rows.after(from, row + in_tile + r - Plan::kRowStep, Plan::kRowStep);
#pragma unroll
      for (int c = 0; c < Tile::kChunks; c += Plan::kLanes)
        copy_async(tile + Tile::offset(in_tile + r, lane + c), from + (lane + c) * 8,
                   r < ((lane + c) * 8 < features ? count : 0));
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < Tile::kRows * Tile::kChunks; i += kThreads) {
      const int in_tile = i / Tile::kChunks, c = i % Tile::kChunks;
      const int count = row + in_tile < end ? features - c * 8 : 0;
      const auto* from = reinterpret_cast<const std::uint16_t*>(rows.at(row + in_tile)) + c * 8;
      std::uint32_t pairs[4] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < count) pairs[e / 2] |= std::uint32_t(__ldg(from + e)) << e % 2 * 16;
      store_shared(tile + Tile::offset(in_tile, c), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
  }
}

// This writes tile rows [begin, begin + kRows) to global rows [row, end). `thread` counts the kThreads threads from 0.
template <bool kAligned, class Tile, int kRows, int kThreads, class Rows>
__device__ __forceinline__ void store_tile(std::uint32_t tile, int begin, const Rows& rows, int row, int end,
                                           int features, int thread) {
  constexpr int kLanes = Tile::kLanes, kRowStep = kThreads / kLanes;
#pragma unroll
  for (int r = thread / kLanes; r < kRows; r += kRowStep) {
    if (row + r >= end) break;
    auto* to = rows.at(row + r);
#pragma unroll
    for (int c = thread % kLanes; c < Tile::kChunks; c += kLanes) {
      const uint4 x = load_shared(tile + Tile::offset(begin + r, c));
      if constexpr (kAligned) {
        if (c * 8 < features) *reinterpret_cast<uint4*>(to + c * 8) = x;
      } else {
        const std::uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (c * 8 + e < features)
            reinterpret_cast<std::uint16_t*>(to)[c * 8 + e] = std::uint16_t(pairs[e / 2] >> e % 2 * 16);
      }
    }
  }
}

// Where rows lie is known without reading anything ahead.
struct NothingAhead {
  NothingAhead() = default;
  template <class Rows>
  __device__ __forceinline__ NothingAhead(const Rows&, int, int) {}
};

// This is the storage policy of mainloops whose threads all copy. Rows that are not kAligned need not lie on 16 bytes.
template <class Input_, bool kAligned>
struct Strided {
  using Input = Input_;

  struct ForwardTensors {
    Tensor query, key, value, output;
  };
  struct BackwardTensors {
    Tensor query, key, value, grad_output, grad_key, grad_value;
  };
  // The last two are null where no gradient is asked for.
  struct SumsTensors {
    Tensor query, key, grad_output, value;
  };
  static ForwardTensors tensors(const ForwardParams& p) { return {p.query, p.key, p.value, p.output}; }
  static BackwardTensors tensors(const BackwardParams& p) {
    return {p.query, p.key, p.value, p.grad_output, p.grad_key, p.grad_value};
  }

  // These say where the rows of a tensor lie: those of all query heads in a tile, from this one on, or of one key head.
  template <class Element, class Args>
  static __device__ __forceinline__ GroupedRows<Element> query_rows(const Args& args, const Tensor& x, int batch,
                                                                    int query_head, const Sequence& sequence) {
    return {rows_of<Element>(x, batch, query_head, sequence.first_q), x.row_stride, x.head_stride, args.group};
  }
  template <class Element>
  static __device__ __forceinline__ StridedRows<Element> key_rows(const Tensor& x, int batch, int key_head,
                                                                  const Sequence& sequence) {
    return {rows_of<Element>(x, batch, key_head, sequence.first_k), x.row_stride};
  }

  template <class Tile, int kThreads>
  using Ahead = NothingAhead;

  template <class Tile, int kThreads, class Rows>
  static __device__ __forceinline__ void load(std::uint32_t tile, const Rows& rows, int row, int end, int features,
                                              NothingAhead) {
    load_tile<kAligned, Tile, kThreads>(tile, rows, row, end, features);
  }
  template <class Tile, int kRows, int kThreads, class Rows>
  static __device__ __forceinline__ void store(std::uint32_t tile, int begin, const Rows& rows, int row, int end,
                                               int features, int thread) {
    store_tile<kAligned, Tile, kRows, kThreads>(tile, begin, rows, row, end, features, thread);
  }
};

}  // namespace attnx::cuda
