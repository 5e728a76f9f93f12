// The tensor memory accelerator brings and takes away rows at fixed strides: this is the storage of Hopper's mainloops.
#pragma once

#include "cuda/common/ptx_sm90.h"
#include "cuda/storage/strided.h"
#include "cuda/storage/tma_views.h"

namespace attnx::cuda {

// This is the storage policy. Tensor maps have dimensions (feature, head of the group, row, head, batch).
template <class Input_>
struct Tma {
  using Input = Input_;
  // So many threads of the producer warpgroup have copies made, and so many times they arrive at the barrier of a full
  // stage: here the thread does when it announces what comes.
  static constexpr int kProducers = 1, kArrivals = 1;
  // Past the end of a sequence tiles have rows of the next one, or unused ones.
  static constexpr bool kReadsOn = true;

  struct ForwardTensors {
    CUtensorMap query, key, value, output;
    Tensor output_rows;
    bool stores_boxes;  // whether TMA can write the output
  };
  struct BackwardTensors {
    CUtensorMap query, key, value, grad_output;
    Tensor grad_key, grad_value;
  };

  // Boxes hold `rows` rows, `keys` keys and, on the way out, `stored_rows` rows.
  static ForwardTensors tensors(const ForwardParams& p, int group, int rows, int keys, int stored_rows) {
    const TmaForwardViews views = tma_views(p, group);
    ForwardTensors tensors{make_tensor_map(views.query, rows),
                           make_tensor_map(views.key, keys),
                           make_tensor_map(views.value, keys),
                           {},
                           p.output,
                           false};
    tensors.stores_boxes = !p.cu_seqlens_q && stored_rows % group == 0 && fits_tma(views.output);
    if (tensors.stores_boxes) tensors.output = make_tensor_map(views.output, stored_rows);
    return tensors;
  }
  static BackwardTensors tensors(const BackwardParams& p, int group, int rows, int keys) {
    const TmaBackwardViews views = tma_views(p, group);
    return {make_tensor_map(views.query, rows),
            make_tensor_map(views.key, keys),
            make_tensor_map(views.value, keys),
            make_tensor_map(views.grad_output, rows),
            p.grad_key,
            p.grad_value};
  }

  static __device__ __forceinline__ void prepare(const ForwardTensors& tensors) {
    prefetch(tensors.query);
    prefetch(tensors.key);
    prefetch(tensors.value);
  }
  static __device__ __forceinline__ void prepare(const BackwardTensors& tensors) {
    prefetch(tensors.query);
    prefetch(tensors.key);
    prefetch(tensors.value);
    prefetch(tensors.grad_output);
  }

  // This is what a producer must know of the rows or keys of a tile before it loads them, which may be well before:
  // here the first.
  template <class Tile>
  using Rows = int;
  template <class Tile, class Args>
  static __device__ __forceinline__ int find_rows(const CUtensorMap&, const Args&, const Sequence&, int, int, int row) {
    return row;
  }
  template <class Tile, class Args>
  static __device__ __forceinline__ int find_keys(const CUtensorMap&, const Args&, const Sequence&, int, int, int key) {
    return key;
  }

  // This announces tiles of so many bytes, and what else the caller has copied, at the barrier that gets them.
  static __device__ __forceinline__ void announce(std::uint32_t barrier, int tile_bytes, int other_bytes = 0) {
    arrive_expecting(barrier, tile_bytes + other_bytes);
  }
  // This is all arrivals at a barrier where no tile comes.
  static __device__ __forceinline__ void announce_none(std::uint32_t barrier) { arrive(barrier); }
  // These have a tile brought that begins with this row or key of a sequence and head, between announce() and finish().
  // Rows are (query, head of the group); where heads do not share a tile, the one head stands among all.
  template <class Tile, class Args>
  static __device__ __forceinline__ void load_rows(std::uint32_t tile, const CUtensorMap& from, const Args& args,
                                                   const Sequence& sequence, int batch, int head, int row,
                                                   std::uint32_t barrier, std::uint64_t cache_policy) {
    int at[5] = {0, 0, int(sequence.first_q) + args.group.divide(row), head, args.cu_seqlens_q ? 0 : batch};
    Tile::load(tile, from, at, barrier, cache_policy);
  }
  template <class Tile, class Args>
  static __device__ __forceinline__ void load_keys(std::uint32_t tile, const CUtensorMap& from, const Args& args,
                                                   const Sequence& sequence, int batch, int head, int key,
                                                   std::uint32_t barrier, std::uint64_t cache_policy) {
    int at[5] = {0, 0, int(sequence.first_k) + key, head, args.cu_seqlens_q ? 0 : batch};
    Tile::load(tile, from, at, barrier, cache_policy);
  }
  static __device__ __forceinline__ void finish(std::uint32_t) {}
  // Consumers call this between the wait for a tile and the first product that reads it.
  static __device__ __forceinline__ void receive() {}

  // These are the places of the gradients of a head's keys.
  template <class Element>
  static __device__ __forceinline__ StridedRows<Element> key_rows(const Tensor& x, int batch, int key_head,
                                                                  const Sequence& sequence) {
    return Strided<Input, true>::template key_rows<Element>(x, batch, key_head, sequence);
  }

  // This stores a warp's 16 rows of the output from shared memory, where no one writes them before wait_stores_read().
  template <class Tile, class Args>
  static __device__ __forceinline__ void store_output(std::uint32_t tile, const Args& args, const Sequence& sequence,
                                                      int batch, int head, int warp_row, int row, int row_end,
                                                      int lane) {
    const auto& tensors = args.tensors;
    if (tensors.stores_boxes) {
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int p = 0; p < Tile::kPanels; ++p)
          store_box(tensors.output, {p * Tile::kPanelFeatures, 0, args.group.divide(row), head, batch},
                    tile + p * Tile::kPanelBytes + warp_row * 128);
        commit_stores();
      }
    } else {
      __syncwarp();
      const GroupedRows<Input> rows{
          rows_of<Input>(tensors.output_rows, batch, query_head_of(args, head), sequence.first_q),
          tensors.output_rows.row_stride, tensors.output_rows.head_stride, args.group};
      store_tile<true, Tile, 16, 32>(tile, warp_row, rows, row, row_end, int(args.value_dim), lane);
    }
  }
};

}  // namespace attnx::cuda
