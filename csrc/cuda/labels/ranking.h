// A warp finds the best of a row of products without sorting them: it halves a range of values until so many products
// as are wanted lie above it.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace attnx::cuda {

// Keys rank like the numbers, with -0 as 0 and NaN above all.
inline constexpr std::uint32_t kNanKey = ~0u;
__device__ __forceinline__ std::uint32_t key_of(float x) {
  const std::uint32_t bits = __float_as_uint(x + 0.0f);
  return x != x ? kNanKey : bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float number_of(std::uint32_t key) {
  return __uint_as_float(key >> 31 ? key & ~(1u << 31) : ~key);
}

// The best of a row are those above a key, and the first so many of those that are equal to it.
struct Cut {
  std::uint32_t key;
  int equals;
};

// The row of one warp: its numbers in shared memory, padded with NaN to whole vectors of all lanes, or, where they do
// not fit there, as they lie in global memory.
template <bool kShared>
class Ranking {
  const float* numbers_;
  int count_, nans_ = 0;
  std::uint32_t lowest_ = kNanKey, highest_ = 0;  // of the others

  // It returns how many numbers are at least x.
  __device__ __forceinline__ int count_from(float x) const {
    int n = 0;
    if constexpr (kShared) {
      const auto* vectors = reinterpret_cast<const float4*>(numbers_);
#pragma unroll 4
      for (int i = threadIdx.x % 32; i * 4 < count_; i += 32) {
        const float4 v = vectors[i];
        n += (v.x >= x) + (v.y >= x) + (v.z >= x) + (v.w >= x);
      }
    } else {
#pragma unroll 4
      for (int i = threadIdx.x % 32; i < count_; i += 32) n += __ldg(numbers_ + i) >= x;
    }
    return __reduce_add_sync(~0u, n);
  }

  // It returns a key between two others. The middle of their numbers is near what is sought as long as numbers are of
  // like size; the middle of the keys halves any range.
  static __device__ __forceinline__ std::uint32_t between(std::uint32_t low, std::uint32_t high, int step) {
    constexpr int kStepsByNumber = 12;
    if (step >= kStepsByNumber) return low + (high - low) / 2;
    return max(low + 1, min(high - 1, key_of(0.5f * number_of(low) + 0.5f * number_of(high))));
  }

 public:
  // With kShared `copy` has room for the count, rounded up to 128.
  __device__ __forceinline__ Ranking(const float* numbers, int count, float* copy)
      : numbers_(kShared ? copy : numbers), count_(count) {
    const int lane = threadIdx.x % 32, padded = kShared ? (count + 127) / 128 * 128 : count;
#pragma unroll 4
    for (int i = lane; i < padded; i += 32) {
      const float x = i < count ? __ldg(numbers + i) : __uint_as_float(kNanKey);
      if constexpr (kShared) copy[i] = x;
      if (x != x) {
        nans_ += i < count;
      } else {
        lowest_ = min(lowest_, key_of(x));
        highest_ = max(highest_, key_of(x));
      }
    }
    nans_ = __reduce_add_sync(~0u, nans_);
    lowest_ = __reduce_min_sync(~0u, lowest_);
    highest_ = __reduce_max_sync(~0u, highest_);
    __syncwarp();  // all lanes see the copy
  }

  __device__ __forceinline__ std::uint32_t key(int i) const {
    return key_of(kShared ? numbers_[i] : __ldg(numbers_ + i));
  }

  __device__ __forceinline__ Cut best(int wanted) const {
    if (wanted <= nans_) return {kNanKey, wanted};
    if (wanted >= count_) return {0, INT_MAX};
    wanted -= nans_;
    std::uint32_t low = lowest_, high = highest_ + 1;  // as many as wanted, or more, are at least low, but not high
    int above = 0;                                     // so many are at least high
    for (int step = 0; high - low > 1; ++step) {
      const std::uint32_t middle = between(low, high, step);
      const int n = count_from(number_of(middle));
      if (n == wanted) return {middle, INT_MAX};
      if (n > wanted) {
        low = middle;
      } else {
        high = middle;
        above = n;
      }
    }
    return {low, wanted - above};
  }
};

// This goes through a row in order and tells what belongs to its best.
class BestOfRow {
  Cut cut_;
  int equals_ = 0;  // those before

 public:
  __device__ __forceinline__ explicit BestOfRow(const Cut& cut) : cut_(cut) {}

  // All lanes of the warp call it, with neighbouring keys of the row; a lane that has none passes 0.
  __device__ __forceinline__ bool takes(std::uint32_t key) {
    if (cut_.equals == INT_MAX) return key >= cut_.key;
    const unsigned equal = __ballot_sync(~0u, key == cut_.key), before = equal & ((1u << threadIdx.x % 32) - 1);
    const bool is_first = key == cut_.key && equals_ + __popc(before) < cut_.equals;
    equals_ += __popc(equal);
    return key > cut_.key || is_first;
  }
};

}  // namespace attnx::cuda
