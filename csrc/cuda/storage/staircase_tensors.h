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
  std::int64_t matrix_ranges;         // as of the layout, which divides
  int groups;                         // of channels that share a range
  Divisor window_tiles, group_tiles;  // of 32 tokens or channels

  static StaircaseTensor of(const Staircase& cache) {
    const StaircaseLayout& layout = cache.layout;
    return {cache, layout.matrix_ranges(), int(layout.head_dim / layout.group), Divisor(layout.window / kCodeBlock),
            Divisor(layout.group / kCodeBlock)};
  }
};

}  // namespace attnx::cuda
