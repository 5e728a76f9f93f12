// This is the forward alone: nothing has a tangent. What the loop asks of tangents beyond that costs nothing here.
#pragma once

#include "cuda/common/tile.h"
#include "cuda/mainloop/forward_rows.h"

namespace attnx::cuda {

// This is the tangents policy.
struct NoTangents {
  static constexpr bool kGiven = false;

  // These are the arguments of the kernel.
  template <class Forward>
  using Arguments = Forward;

  // This is what a thread has of the score.
  template <class Score, class Input, class Tile, int kRows>
  using Rows = typename Score::template Forward<Input, Tile, kRows>;

  // A row has so many sums.
  template <class Score>
  static constexpr int sums(int features) {
    return features;
  }

  template <class Score, class Storage, class Tile>
  struct Block {
    template <class Args, class Place>
    __device__ __forceinline__ Block(const Args&, const Place&) {}

    // These start copies beside those to this tile: of a block's rows, or of the keys or values from one on, up to an
    // end.
    template <class Args, class Place>
    __device__ __forceinline__ void load_query(const Args&, std::uint32_t, const Place&) const {}
    template <class Args>
    __device__ __forceinline__ void load_key(const Args&, std::uint32_t, int, int) const {}
    template <class Args>
    __device__ __forceinline__ void load_value(const Args&, std::uint32_t, int, int) const {}

    // This makes the products of a tile.
    template <class Args, class Queries, class Keys, int kM, int kN>
    __device__ __forceinline__ void multiply_keys(const Args&, float (&s)[kM][kN][4], const Queries& queries,
                                                  const Keys& keys) const {
      multiply<typename Storage::Input, Tile::kHeadDim>(s, queries, keys);
    }
    // This comes before the score begins with a tile of logits.
    template <class Args, class Rows, int kM, int kN>
    __device__ __forceinline__ void begin(const Args&, const float (&)[kM][kN][4], const Rows&) const {}

    // This adds what the tile's weights make of its values to the sums.
    template <class Args, class Rows, class Logits, class Values, int kM, int kN, int kD>
    __device__ __forceinline__ void multiply_values(const Args&, float (&sums)[kM][kD][4], float (&s)[kM][kN][4],
                                                    Rows& rows, const Logits& logits, const Values& values) const {
      multiply<typename Storage::Input, Tile::kN>(sums, Weights<Rows, Logits, kM, kN>{s, rows, logits}, values);
    }

    // This makes a row's results of its sums. Those of its output were multiplied with this factor.
    template <int kM, int kD>
    __device__ __forceinline__ void finish(int, float (&)[kM][kD][4], float) const {}
  };
};

}  // namespace attnx::cuda
