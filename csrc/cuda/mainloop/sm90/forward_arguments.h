// This defines the arguments of the forward kernel for sm_90a.
#pragma once

#include "cuda/mainloop/forward_arguments.h"

namespace attnx::cuda {

// This says how blocks that stay take tiles of rows.
struct ForwardSchedule {
  int row_tiles;    // of all heads and splits
  Divisor section;  // heads, of all sequences, whose keys and values stay in L2 together
  int* taken;       // device memory, 0 at launch: tiles that blocks have taken besides their first ones
};

template <class Score, class Tiles, class Storage, class Logits>
struct PersistentForwardArguments : ForwardArguments<Score, Tiles, Storage, Logits>, ForwardSchedule {
#ifdef __CUDACC__
  // This returns the number, as ForwardPlace counts, of the tile that is n-th in order. All tiles of a section come
  // before the next section, and within one the same rows of all heads come together, the longest first.
  __device__ __forceinline__ int in_order(int n) const {
    const int split = this->splits.split(n), head = section.split(n), block = this->query_blocks.split(n);
    return ((n * section.divisor() + head) * this->query_blocks.divisor() + block) * this->splits.divisor() + split;
  }
#endif
};

}  // namespace attnx::cuda
