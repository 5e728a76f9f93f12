// This says where the numbers of a staircase cache lie. It is plain data, which the host fills in.
#pragma once

#include "attnx/params.h"
#include "cuda/common/divisor.h"

namespace attnx::cuda {

// These are the keys of all heads, or the values. They are types of their own because they are stored transposed to
// each other.
template <StaircaseMatrix kWhich>
struct StaircaseTensor {
  Staircase cache;
  Divisor window_tiles, group_tiles;  // of 32 tokens or channels

  static StaircaseTensor of(const Staircase& cache) {
    return {cache, Divisor(cache.layout.window / kCodeBlock), Divisor(cache.layout.group / kCodeBlock)};
  }
};

}  // namespace attnx::cuda
