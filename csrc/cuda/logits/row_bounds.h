// This hides from each row of a tile of logits the keys that lie outside of its bounds.
#pragma once

#include "cuda/common/logits.h"

namespace attnx::cuda {

// Row and key are the thread's first. Rows past the last one, whose results nothing reads, take its bounds.
template <int kM, int kN>
__device__ __forceinline__ void hide_outside_bounds(float (&s)[kM][kN][4], const RowBounds& bounds, int batch, int head,
                                                    int row, int key, int last_row) {
  if (!bounds.data) return;
  const std::int32_t* const of_head = bounds.data + batch * bounds.batch_stride + head * bounds.head_stride;
#pragma unroll
  for (int r = 0; r < kM * 2; ++r) {
    const std::int32_t* const at = of_head + min(row + row_of(r), last_row) * bounds.row_stride;
    // A key is at least 0, so a difference with it does not overflow.
    const int first = max(__ldg(at), 0) - key, end = max(__ldg(at + 1), 0) - key;
    if (first <= 0 && end >= kN * 8) continue;  // the row sees the whole tile
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (n * 8 + e < first || n * 8 + e >= end) s[r / 2][n][r % 2 * 2 + e] = -INFINITY;
  }
}

}  // namespace attnx::cuda
