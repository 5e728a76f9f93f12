// This defines the arguments of the backward kernels.
#pragma once

#include "cuda/common/geometry.h"

namespace attnx::cuda {

struct BackwardGeometry : Geometry {
  Divisor key_heads, key_blocks;  // heads, and tiles along the longest sequence's keys
  int row_heads;                  // heads of tiles of rows on a key head
  std::int64_t row_tiles;         // to a head
};

// A sharpened row has these numbers beside its logsumexp and delta: gain and shift of the pass before the forward, what
// all of its gradients have subtracted, and the power.
struct alignas(16) SharpenedRow {
  float gain, shift, of_mean, power;
};

// These are partial results by tile of rows, [head][row tile][...], in the workspace.
struct BackwardScratch {
  // This is [row]: what a row's logits get, times log2(e), which is the bias of a pointwise score, or -logsumexp. Where
  // a score kHasRows, its weights are no powers, and it is what they are multiplied with, 1 / Z.
  float* offset;
  SharpenedRow* sharpened;  // [row]: null for other scores
  float* delta;             // [row]: a normalised score's rowsum(grad_output * output) - grad_logsumexp
  // This is the tile's grad_query / scale, by threads of the main kernel: [element of a thread][thread].
  float* grad_query_sum;
  float *bias_sum, *slope_sum;  // [warp][row]: sums of grad_logits, and of them times distance; null: not wanted
  int* turns;                   // in deterministic order: how many tiles of keys have added theirs to grad_query_sum
  bool deterministic;
};

template <class Tiles, class Storage, class Logits>
struct BackwardArguments : BackwardGeometry, Logits::Arguments, BackwardScratch {
  typename Storage::BackwardTensors tensors;
  typename Tiles::BackwardParameters tiles;
};

}  // namespace attnx::cuda
