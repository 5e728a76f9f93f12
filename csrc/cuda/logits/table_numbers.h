// This adds the numbers of tables by distance to a tile of logits, which are times log2(e).
#pragma once

#include "cuda/common/logits.h"
#include "cuda/logits/pair_mask.h"

namespace attnx::cuda {

// It returns the place in a row of a table that belongs to a distance, which counts from `length_k - 1` on. Numbers of
// the index come from memory of the device, so that nothing has checked them.
__device__ __forceinline__ int table_place(const DistanceTables& tables, int distance) {
  return min(unsigned(__ldg(tables.index + distance)), unsigned(tables.numbers - 1));
}

// This is the policy of the numbers of pairs that tables have. Row and key are the thread's first.
struct TableNumbers {
  struct Arguments : LogitTermsArguments {
    DistanceTables tables;
  };
  static Arguments arguments(const LogitTermsArguments& terms, const AttentionParams& p) {
    return {terms, p.terms.tables};
  }
  static constexpr bool kHasLists = false;

  template <class Input, class Args, int kM, int kN>
  static __device__ __forceinline__ void add(float (&s)[kM][kN][4], const Args& args, int batch, int head, int row,
                                             int key, bool /*inside*/, MaskEnds ends) {
    const DistanceTables& tables = args.tables;
    const auto of_head = [&](const Tensor& table) {
      return static_cast<const float*>(table.data) + batch * table.batch_stride + head * table.head_stride;
    };
    const float* const of_queries = of_head(tables.query);
    const float* const of_keys = of_head(tables.key);
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int own_key = min(key + n * 8 + e, ends.last_key);
#pragma unroll
        for (int r = 0; r < kM * 2; ++r) {
          const int own_row = min(row + row_of(r), ends.last_row);
          const int place = table_place(tables, own_row - own_key + ends.last_key);
          float added = 0;
          if (tables.query.data) added = __ldg(of_queries + own_row * tables.query.row_stride + place);
          if (tables.key.data) added += __ldg(of_keys + own_key * tables.key.row_stride + place);
          float& x = s[r / 2][n][r % 2 * 2 + e];
          x = fmaf(added, kLog2E, x);
        }
      }
  }
};

}  // namespace attnx::cuda
