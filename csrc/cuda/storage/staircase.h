// This is the storage of loops over a staircase cache: keys and values are unpacked on the way to their tiles, and
// queries and outputs are strided.
#pragma once

#include <type_traits>

#include "cuda/mainloop/forward_arguments.h"
#include "cuda/storage/staircase_tile.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

// These are the keys or the values of one head.
template <StaircaseMatrix kWhich>
struct StaircaseRows {
  const StaircaseTensor<kWhich>& from;
  int batch, head;
};

template <StaircaseMatrix kWhich>
__device__ __forceinline__ StaircaseRows<kWhich> fresh(const StaircaseRows<kWhich>& rows) {
  return rows;
}

// These are the rows of the query heads that share a key head.
template <class Element>
struct QueryRows : GroupedRows<Element> {
  bool aligned;
};

// The threads of a block unpack tokens [key, end) to a tile; the rest of the tile becomes 0.
template <class Tile, int kThreads, class Element, StaircaseMatrix kWhich>
__device__ __forceinline__ void unpack_tile(std::uint32_t tile, const StaircaseRows<kWhich>& rows, int key, int end) {
  constexpr int kSide = kCodeBlock, kAcross = Tile::kFeatures / kSide;
  constexpr int kBlocks = Tile::kRows / kSide * kAcross * 32 / kThreads;  // of a warp
  static_assert(kBlocks > 0 && kAcross % kBlocks == 0);                   // they have the same tokens
  const int warp = __shfl_sync(~0u, fresh(threadIdx.x) / 32, 0);          // the compiler sees that all lanes agree
  const int first = warp * kBlocks, row = first / kAcross * kSide;
  const StaircaseTokens<Tile, Element, kWhich> tokens(rows.from, fresh(rows.batch), fresh(rows.head), key + row, tile,
                                                      row);
  const StaircaseLayout& layout = rows.from.cache.layout;
  const int windows = tokens.windows(end), tail = windows * int(layout.window);
#pragma unroll 1
  for (int block = 0; block < kBlocks; ++block) {
    const int channel = (first % kAcross + block) * kSide;
    if (key + row < tail && channel < int(layout.head_dim)) {
      tokens.unpack(channel, windows);
    } else {
      tokens.copy_tail(channel, tail, end);
    }
  }
}

// This is the storage policy.
template <class Input_>
struct Unpacked {
  using Input = Input_;

  struct ForwardTensors {
    Tensor query;
    StaircaseTensor<kKeyMatrix> key;
    StaircaseTensor<kValueMatrix> value;
    Tensor output;
    const std::int64_t* query_lengths;  // [batch]; null: all of the call
    bool aligned;                       // whether rows of query and output start on 16 bytes and are multiples of them
  };
  static ForwardTensors tensors(const ForwardParams& p, bool aligned) {
    return {p.query,
            StaircaseTensor<kKeyMatrix>::of(*p.cache),
            StaircaseTensor<kValueMatrix>::of(*p.cache),
            p.output,
            p.query_lengths,
            aligned};
  }

  template <class Element, class Args>
  static __device__ __forceinline__ QueryRows<Element> query_rows(const Args& args, const Tensor& x, int batch,
                                                                  int query_head, const Sequence&) {
    return {{rows_of<Element>(x, batch, query_head, 0), x.row_stride, x.head_stride, args.group}, args.tensors.aligned};
  }
  template <class Element, StaircaseMatrix kWhich>
  static __device__ __forceinline__ StaircaseRows<kWhich> key_rows(const StaircaseTensor<kWhich>& x, int batch,
                                                                   int key_head, const Sequence&) {
    return {x, batch, key_head};
  }

  template <class Tile, int kThreads>
  using Ahead = NothingAhead;

  // A tile of queries is loaded once, so that a branch does for rows that are not aligned, and a loop that needs few
  // registers.
  template <class Tile, int kThreads, class Element>
  static __device__ __forceinline__ void load(std::uint32_t tile, const QueryRows<Element>& rows, int row, int end,
                                              int features, NothingAhead) {
    if (!rows.aligned) return load_tile<false, Tile, kThreads>(tile, rows, row, end, features);
#pragma unroll 1
    for (int i = fresh(threadIdx.x); i < Tile::kRows * Tile::kChunks; i += kThreads) {
      const int in_tile = i / Tile::kChunks, c = i % Tile::kChunks;
      copy_async(tile + Tile::offset(in_tile, c), rows.at(row + in_tile) + c * 8,
                 row + in_tile < end && c * 8 < features);
    }
  }
  template <class Tile, int kThreads, StaircaseMatrix kWhich>
  static __device__ __forceinline__ void load(std::uint32_t tile, const StaircaseRows<kWhich>& rows, int key, int end,
                                              int, NothingAhead) {
    unpack_tile<Tile, kThreads, Input>(tile, rows, key, end);
  }
  template <class Tile, int kRows, int kThreads, class Element>
  static __device__ __forceinline__ void store(std::uint32_t tile, int begin, const QueryRows<Element>& rows, int row,
                                               int end, int features, int thread) {
    rows.aligned ? store_tile<true, Tile, kRows, kThreads>(tile, begin, rows, row, end, features, thread)
                 : store_tile<false, Tile, kRows, kThreads>(tile, begin, rows, row, end, features, thread);
  }
};

// The cache knows how long sequences are.
template <class Score, class Tiles, template <class> class Storage, class Input, class Logits>
  requires std::is_base_of_v<Unpacked<Input>, Storage<Input>>
__device__ __forceinline__ Sequence sequence_of(const ForwardArguments<Score, Tiles, Storage<Input>, Logits>& args,
                                                int batch) {
  const auto& tensors = args.tensors;
  const int length_q = tensors.query_lengths ? int(tensors.query_lengths[batch]) : int(args.length_q);
  const int length_k = int(tensors.key.cache.of(batch).length());
  return {length_q, 0, 0, {length_k, length_k - length_q, args.left, args.right}};
}

}  // namespace attnx::cuda
