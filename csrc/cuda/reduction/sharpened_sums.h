// This sums over the keys of a row what the gradients of a sharpened row have in common.
#pragma once

#include "cuda/mainloop/row_numbers.h"
#include "cuda/reduction/softplus_rows.h"

namespace attnx::cuda {

// This is the reduction policy. A thread block owns a tile of rows, and writes the row's sum times gain / n, or 0 in a
// row from whose weights no mean is taken.
struct SharpenedSums {
  static constexpr bool kHasBias = false, kKeysStay = false, kRowsStay = true, kCopiesLate = false;

  struct Parameters {
    Divisor row_blocks;  // tiles along the rows
  };

  template <class Tile>
  using Walk = Largest::Walk<Tile>;

  template <class Tile>
  class Sums {
    static_assert(Tile::kKeyWarps == 1);
    static constexpr int kRows = Tile::kWarpRows / 8;
    float sum_[kRows] = {};

   public:
    template <bool, int kM, int kN, class Other>
    __device__ __forceinline__ void add(const float (&x)[kM][kN][4], const Other (&)[kM * 2]) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) sum_[r] += x[r / 2][n][r % 2 * 2 + e];
    }

    template <class Args>
    __device__ __forceinline__ void store(const Args& args, const Walk<Tile>& walk) const {
      const int lane = threadIdx.x % 32;
      const int row = walk.row(0) + threadIdx.x / 32 * Tile::kWarpRows + lane / 4;
      const Sequence& sequence = walk.sequence(0);
      const HeadOfSharpened numbers(args.rows, walk.batch(0), sequence, walk.head(0));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float sum = sum_of_quad(sum_[r]);
        const int query = row + row_of(r);
        if (lane % 4 != 0 || query >= sequence.length_q) continue;
        const Visible visible = sequence.band.visible(query);
        SharpenedRow& own = numbers.row(query);
        own.of_mean = own.shift == 0 ? 0 : own.gain * sum / float(visible.end - visible.first);
      }
    }
  };
};

}  // namespace attnx::cuda
