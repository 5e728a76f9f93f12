// This is the softmax score: it keeps the running maximum and sum of each row (Milakov and Gimelshein 2018; Dao et al.
// 2022).
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/common/reduce.h"
#include "cuda/common/sequence.h"

namespace attnx::cuda {

// This has a thread's kRows rows in the forward.
template <class Input_, int kRows>
class SoftmaxForward {
  float max_[kRows], sum_[kRows];  // the maximum times log2(e), less the tile's bias; the thread's part of the sum
  float multiplier_, bias_ = 0;

 protected:
  // This is the maximum before the first key. It is finite, so that what is masked can be subtracted from it.
  static constexpr float kLowest = -0x1p100f;

  __device__ __forceinline__ void start_row(int row, float max, float sum) {
    max_[row] = max;
    sum_[row] = sum;
  }

 public:
  using Input = Input_;

  // The thread's row of this number is this query of this query head, of which the block has this share of the keys.
  template <class Parameters>
  __device__ __forceinline__ void set_row(int row, const Parameters&, const Band&, int, int, int) {
    start_row(row, kLowest, 0);
  }

  // This starts a tile: a logit is s * multiplier + bias, times log2(e); the multiplier is positive. No list has a
  // divisor of normalised weights.
  template <bool kHasBias, int kM, int kN, int kD>
  __device__ __forceinline__ void begin(const float (&s)[kM][kN][4], float (&o)[kM][kD][4], float multiplier,
                                        float bias, float) {
    multiplier_ = multiplier;
    float rescale[kRows];
    bool risen = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kN; ++n) highest = fmaxf(highest, fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
      // The maximum is kept relative to the tile's bias, which is the same for all rows.
      const float before = kHasBias ? max_[r] + bias_ - bias : max_[r];
      max_[r] = fmaxf(before, max_of_quad(highest) * multiplier);
      rescale[r] = exp2_approx(before - max_[r]);
      sum_[r] *= rescale[r];
      risen |= before != max_[r];
    }
    // Maxima rise in the first tiles and seldom later, so that most tiles leave O alone (FlashAttention-4).
    if (__any_sync(~0u, risen)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int d = 0; d < kD; ++d) {
          o[r / 2][d][r % 2 * 2] *= rescale[r];
          o[r / 2][d][r % 2 * 2 + 1] *= rescale[r];
        }
      }
    }
    bias_ = bias;
  }

  __device__ __forceinline__ float weight(float s, int row) {
    const float p = exp2_approx(fmaf(s, multiplier_, -max_[row]));
    sum_[row] += p;
    return p;
  }

  // This sets the weight's derivative by its logit, too, as it is before the sum is taken.
  __device__ __forceinline__ float weight(float s, int row, float& derivative) { return derivative = weight(s, row); }
  // This tells, before a tile begins, whether the row has seen no key yet.
  __device__ __forceinline__ bool starts(int row) const { return max_[row] == kLowest; }

  // This returns what the row's sums are multiplied with in the end. A row that sees no key has sums of 0.
  __device__ __forceinline__ float finish(int row) {
    sum_[row] = sum_of_quad(sum_[row]);
    return sum_[row] == 0 ? 1 : 1 / sum_[row];
  }
  // This is valid after finish().
  __device__ __forceinline__ float logsumexp(int row) const {
    return sum_[row] == 0 ? -INFINITY : (max_[row] + bias_ + log2f(sum_[row])) * kLn2;
  }
};

// This is the score policy.
struct Softmax {
  // Rows have a logsumexp, which is an output and what the backward starts from, and a delta there.
  static constexpr bool kNormalised = true;
  // It has loops over lists, too.
  static constexpr bool kBandOnly = false;

  struct Parameters {};  // what rows read in the forward
  static Parameters parameters(const AttentionParams&) { return {}; }

  template <class Input, class Tile, int kRows>
  using Forward = SoftmaxForward<Input, kRows>;
  // This is for rows whose weights have derivatives.
  template <class Input, int kRows>
  using ForwardAlong = SoftmaxForward<Input, kRows>;

  // The backward sees a logit with its row's offset, -logsumexp, times log2(e).
  template <class Input>
  struct Backward {
    static constexpr bool kHasRows = false;  // a logit comes with its row's offset, which is all
    static constexpr float kWeightScale = 1;
    // This returns the weight, and sets what the gradient of the weight less the row's delta is multiplied with.
    static __device__ __forceinline__ float weight(float logit, float& factor) {
      factor = exp2_approx(logit);
      return factor;
    }
  };
};

}  // namespace attnx::cuda
