// This keeps a sum for each pair of a row and a key that a thread has.
#pragma once

namespace attnx::cuda {

// This is what the sums of a reduction are made of that tells pairs apart.
template <class Tile>
class PairSums {
 protected:
  float sums_[Tile::kWarpRows / 16][Tile::kWarpKeys / 8][4] = {};

 public:
  template <bool, int kM, int kN>
  __device__ __forceinline__ void add(const float (&x)[kM][kN][4], const float (&)[kM * 2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums_[m][n][e] += x[m][n][e];
  }
};

}  // namespace attnx::cuda
