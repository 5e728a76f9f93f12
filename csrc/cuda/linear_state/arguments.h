// The kernels of linear attention with a state are passed this. A unit of work is a head of keys, with the heads of
// queries that read its state, some columns of the values, and a segment: some chunks of tokens one after another. The
// states of segments are made first, where there are several, and summed up in order.
#pragma once

#include "attnx/linear_state_params.h"

namespace attnx::cuda {

struct LinearStateArguments {
  LinearStateParams p;
  int chunk;                // tokens
  int tiles, width;         // of columns of the values
  int segments;             // of a head
  std::int64_t of_segment;  // tokens
  float scale;              // of queries, before their features
  float* states = nullptr;  // [batch * heads_k][segments][features][value_dim + 1]; then the sums of earlier ones
  int features;             // of a row
  std::int64_t state_size;  // numbers
  bool reversed = false;    // whether segments follow each other from the last to the first
};

inline constexpr int kStateThreads = 256, kStateWarps = kStateThreads / 32;

}  // namespace attnx::cuda
