// A tile of products goes through this before the score, where it is not whole or has distances: ALiBi and the band.
#pragma once

#include "cuda/common/sequence.h"

namespace attnx::cuda {

// This numbers the rows of a tile that a lane's accumulators hold, as [block of 16 rows][half].
__device__ __forceinline__ constexpr int row_of(int number) { return number / 2 * 16 + number % 2 * 8; }

// This turns s into s * multiplier - slope |distance| log2(e), or -inf where the query does not see the key. `row` is
// the thread's first (query, head) row, whose heads count from first_head; `key` is its first key.
template <class Args, int kM, int kN>
__device__ __forceinline__ void place_logits(float (&s)[kM][kN][4], const Args& args, const Band& band, int first_head,
                                             int row, int key, float multiplier) {
#pragma unroll
  for (int r = 0; r < kM * 2; ++r) {
    const int query = args.group.divide(row + row_of(r));
    const int query_head = first_head + row + row_of(r) - query * args.group.divisor();
    const float slope =
        args.alibi_slopes.data && query_head < args.heads_q ? of_head(args.alibi_slopes, query_head) * kLog2E : 0;
    const Visible visible = band.visible(query);
    const int first = visible.first - key, end = visible.end - key;
    const float distance = float(query + band.offset - key);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[r / 2][n][r % 2 * 2 + e];
        const int column = n * 8 + e;
        x = fmaf(-slope, fabsf(distance - float(column)), x * multiplier);
        if (column < first || column >= end) x = -INFINITY;
      }
    }
  }
}

// This does the same, with the call's scale, where s is transposed: its rows are keys, its columns are (query, head)
// rows, and `key` is the thread's first.
template <class Args, int kM, int kN>
__device__ __forceinline__ void place_transposed_logits(float (&s)[kM][kN][4], const Args& args, const Band& band,
                                                        int first_head, int key, int row) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int own = row + n * 8 + e, query = args.group.divide(own);
      const int query_head = first_head + own - query * args.group.divisor();
      const float slope =
          args.alibi_slopes.data && query_head < args.heads_q ? of_head(args.alibi_slopes, query_head) * kLog2E : 0;
      const Visible visible = band.visible(query);
      const int first = visible.first - key, end = visible.end - key;
      const float distance = float(query + band.offset - key);
#pragma unroll
      for (int r = 0; r < kM * 2; ++r) {
        float& x = s[r / 2][n][r % 2 * 2 + e];
        x = fmaf(-slope, fabsf(distance - float(row_of(r))), x * args.scale_log2);
        if (row_of(r) < first || row_of(r) >= end) x = -INFINITY;
      }
    }
}

}  // namespace attnx::cuda
