// This is how a warp writes one list of sampled blocks.
#pragma once

#include <cstdint>

namespace attnx::cuda {

struct SampledLists {
  std::int32_t *counts, *indices;
  float* corrections;  // null where they are not wanted
  bool logarithm;

#ifdef __CUDACC__
  // A lane asks keeps(block, p) whether a block of [first, width) is kept, which also sets its probability, and the
  // ballot says where in the list it comes. The rest of the list becomes 0.
  template <class Keeps>
  __device__ __forceinline__ void write(std::int64_t number, int first, int width, const Keeps& keeps) const {
    const int lane = threadIdx.x % 32;
    std::int32_t* const own_indices = indices + number * width;
    int count = 0;
    for (; first < width; first += 32) {
      float p = 1;
      const bool kept = first + lane < width && keeps(first + lane, p);
      const unsigned all = __ballot_sync(~0u, kept);
      const int place = count + __popc(all & ((1u << lane) - 1));
      if (kept) {
        own_indices[place] = first + lane;
        if (corrections) corrections[number * width + place] = logarithm ? -logf(p) : p;
      }
      count += __popc(all);
    }
    for (int place = count + lane; place < width; place += 32) own_indices[place] = 0;
    if (lane == 0) counts[number] = count;
  }
#endif
};

}  // namespace attnx::cuda
