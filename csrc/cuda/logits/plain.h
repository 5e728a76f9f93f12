// These are the logits of calls that do no more to a product than scale it and subtract ALiBi's distances. Most tiles
// keep their products, which the score scales.
#pragma once

#include "cuda/common/logits.h"

namespace attnx::cuda {

// This is the logits policy.
struct Plain {
  using Arguments = LogitScaling;
  static Arguments arguments(const LogitScaling& scaling, const AttentionParams&) { return scaling; }

  static constexpr bool kHasLists = true;
  // Query heads that share a key head may share tiles of rows.
  static constexpr bool kPerHead = false;
  // Only tiles that are not whole go through place().
  static constexpr bool kEveryTile = false;

  // The results are multiplied with this in the end.
  template <class Args>
  static __device__ __forceinline__ constexpr float result_factor(const Args&) {
    return 1;
  }

  // This is what a tile's logits leave to its weights: nothing.
  template <class Score, class Input, int kM, int kN>
  struct Forward {
    template <class Args, class Place>
    __device__ __forceinline__ void place(float (&s)[kM][kN][4], const Args& args, const Place& place, int first_head,
                                          int row, int key, bool) {
      place_logits(s, args, place.sequence.band, first_head, row, key, args.scale_log2);
    }
    // A weight is that of a key, and a packed pair of weights that of a row and two keys.
    __device__ __forceinline__ float weight(float weight, int, int) const { return weight; }
    __device__ __forceinline__ std::uint32_t kept(std::uint32_t weights, int, int) const { return weights; }
  };

  // This is what they leave to its weights and gradients.
  template <class Score, class Input, int kM, int kN>
  struct Backward : Forward<Score, Input, kM, kN> {
    using Gradients = float[kM][kN][4];
    template <class Args>
    __device__ __forceinline__ void drop(Gradients&, const Args&) const {}
    // This returns the gradients of the products, where these are of the logits.
    __device__ __forceinline__ Gradients& of_products(Gradients& of_logits) { return of_logits; }
  };
};

}  // namespace attnx::cuda
