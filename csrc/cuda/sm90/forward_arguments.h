// What the forward kernel for sm_90a is passed.
#pragma once

#include <cuda.h>

#include "cuda/arguments.h"

namespace attnx::cuda {

struct TmaForwardArguments {
  CUtensorMap query, key, value, output;  // (features, head of the group, row, head, batch)
  ForwardArguments args;
  int row_tiles;      // of all heads and splits
  Divisor section;    // heads, of all sequences, whose keys and values stay in L2 together
  int* taken;         // device memory, 0 at launch: tiles that blocks have taken besides their first ones
  bool stores_boxes;  // whether TMA can write output

  // The number, as ForwardPlace counts, of the tile that is n-th in order: all of a section before the next, and in it
  // the same rows of all heads, the longest first.
  __device__ __forceinline__ int in_order(int n) const {
    const int split = args.splits.split(n), head = section.split(n), block = args.query_blocks.split(n);
    return ((n * section.divisor() + head) * args.query_blocks.divisor() + block) * args.splits.divisor() + split;
  }
};

}  // namespace attnx::cuda
