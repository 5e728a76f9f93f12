// This finds what the sharpened softplus must know of a row before it weighs the first key: a gain and a shift, which
// follow from the sum Z of the row's softplus and from its largest logit.
//
//     u = n softplus(t) / Z - o      v = u / u_max = gain softplus(t) - shift
//
// Here o is 1, but 0 where a row sees at most three keys. Where all logits are the same none stands above the mean, and
// gain and shift are 0.
#pragma once

#include "cuda/reduction/largest.h"
#include "cuda/score/softplus.h"

namespace attnx::cuda {

// This is the reduction policy. A thread block owns a tile of rows, as for the largest logits.
struct SoftplusRows {
  static constexpr bool kHasBias = false, kKeysStay = false, kRowsStay = true, kCopiesLate = false;
  static constexpr int kKeysWithoutMean = 3;

  struct Parameters {
    Divisor row_blocks;  // tiles along the rows
    Tensor gain, shift;  // like a logsumexp
  };

  template <class Tile>
  using Walk = Largest::Walk<Tile>;

  template <class Tile>
  class Sums {
    static_assert(Tile::kKeyWarps == 1);
    static constexpr int kRows = Tile::kWarpRows / 8;
    float sum_[kRows], largest_[kRows], smallest_[kRows];

   public:
    __device__ __forceinline__ Sums() {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sum_[r] = 0;
        largest_[r] = -INFINITY;
        smallest_[r] = INFINITY;
      }
    }

    // A hidden key's logit is -inf, and its softplus 0.
    template <bool, int kM, int kN>
    __device__ __forceinline__ void add(const float (&x)[kM][kN][4], const float (&)[kM * 2]) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float logit = x[r / 2][n][r % 2 * 2 + e];
            float power;
            sum_[r] += softplus_of_log2(logit, power);
            largest_[r] = fmaxf(largest_[r], logit);
            smallest_[r] = fminf(smallest_[r], logit == -INFINITY ? INFINITY : logit);
          }
    }

    template <class Args>
    __device__ __forceinline__ void store(const Args& args, const Walk<Tile>& walk) const {
      const int lane = threadIdx.x % 32;
      const int row = walk.row(0) + threadIdx.x / 32 * Tile::kWarpRows + lane / 4;
      const Sequence& sequence = walk.sequence(0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float sum = sum_of_quad(sum_[r]), largest = max_of_quad(largest_[r]);
        const float smallest = -max_of_quad(-smallest_[r]);
        const int query = row + row_of(r);
        if (lane % 4 != 0 || query >= sequence.length_q) continue;
        const Visible visible = sequence.band.visible(query);
        const double keys = visible.end - visible.first, mean = keys > kKeysWithoutMean;
        const double x = double(largest) * double(kLn2);
        const double most = keys * (fmax(x, 0.0) + log1p(exp(-fabs(x)))) / double(sum) - mean;
        const bool none = sum == 0 || most <= 0 || (mean == 1 && largest == smallest);
        const auto store = [&](const Tensor& to, double number) {
          *rows_of<float>(to, walk.batch(0), walk.head(0), sequence.first_q + query) = none ? 0 : float(number);
        };
        store(args.reduction.gain, keys / double(sum) / most);
        store(args.reduction.shift, mean / most);
      }
    }
  };
};

}  // namespace attnx::cuda
