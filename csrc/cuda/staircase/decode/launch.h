// This plans and launches decoding over a staircase cache.
#pragma once

#include <cstddef>

#include "cuda/attention.h"
#include "cuda/staircase/decode/arguments.h"

namespace attnx::cuda {

struct DecodePlan {
  int rows = 0;      // of a block
  int head_dim = 0;  // what it is padded to
  std::int64_t row_blocks = 0, tiles = 0, splits = 1;
  DecodeParts parts;
  std::size_t workspace = 0;

  // The grid depends on what the cache can hold and not on what it holds, so that a captured graph replays it.
  DecodePlan(const ForwardParams& params, void* workspace);
};

void run_decode(const ForwardParams& params, const DecodePlan& plan, cudaStream_t stream);

}  // namespace attnx::cuda
