// Rows at fixed strides that the tensor memory accelerator brings and takes away: the storage of Hopper's mainloops.
#pragma once

#include "cuda/common/ptx_sm90.h"
#include "cuda/storage/strided.h"
#include "cuda/storage/tma_views.h"

namespace attnx::cuda {

// The storage policy. Tensor maps have dimensions (feature, head of the group, row, head, batch).
template <class Input_>
struct Tma {
  using Input = Input_;
  // Threads of the producer warpgroup that have copies made, each of which arrives at the barrier of a full stage.
  static constexpr int kProducers = 1;

  struct ForwardTensors {
    CUtensorMap query, key, value, output;
    Tensor output_rows;
    bool stores_boxes;  // whether TMA can write the output
  };
  struct BackwardTensors {
    CUtensorMap query, key, value, grad_output;
    Tensor grad_key, grad_value;
  };

  // For tiles of so many rows and keys, and stores of so many rows.
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

  // Has a tile of rows of a head copied, whose bytes the barrier gets; `row` counts from the start of the tensor.
  template <class Tile>
  static __device__ __forceinline__ void load(std::uint32_t tile, const CUtensorMap& from, int row, int head, int batch,
                                              std::uint32_t barrier, std::uint64_t cache_policy) {
    int at[5] = {0, 0, row, head, batch};
    Tile::load(tile, from, at, barrier, cache_policy);
  }
};

}  // namespace attnx::cuda
