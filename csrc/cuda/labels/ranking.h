// A warp finds the best of a row of products without sorting them: it narrows a range of numbers until as many as are
// wanted lie above it.
#pragma once

#include <climits>

#include "cuda/common/ordered_bits.h"

namespace attnx::cuda {

// Keys rank like the numbers, with -0 as 0 and NaN above all.
inline constexpr std::uint32_t kNanKey = ~0u;
__device__ __forceinline__ std::uint32_t key_of(float x) { return x != x ? kNanKey : ordered_bits(x); }
__device__ __forceinline__ float number_of(std::uint32_t key) {
  return __uint_as_float(key >> 31 ? key & ~(1u << 31) : ~key);
}

// The best of a row are the numbers above a key, and those equal to it whose index is below the end.
struct Cut {
  std::uint32_t key;
  int end;

  __device__ __forceinline__ bool takes(std::uint32_t other, int index) const {
    return bool((other > key) | ((other == key) & (index < end)));
  }
};

// This is the row of one warp. Its numbers lie in shared memory, padded with NaN to vectors of all lanes, or, where
// they do not fit there, stay in global memory.
template <bool kShared>
class Ranking {
  static constexpr int kPadding = 128;

  const float* numbers_;
  int count_, nans_;
  std::uint32_t lowest_, highest_;  // keys of the others

  // It returns how many numbers are at least x. Their count in float is exact, and one instruction less each.
  __device__ __forceinline__ int count_from(float x) const {
    float n = 0;
    if constexpr (kShared) {
      const auto* vectors = reinterpret_cast<const float4*>(numbers_) + threadIdx.x % 32;
#pragma unroll 4
      for (int i = 0; i < count_; i += kPadding) {
        const float4 v = vectors[i / 4];
        n += v.x >= x ? 1.0f : 0.0f;
        n += v.y >= x ? 1.0f : 0.0f;
        n += v.z >= x ? 1.0f : 0.0f;
        n += v.w >= x ? 1.0f : 0.0f;
      }
    } else {
#pragma unroll 4
      for (int i = threadIdx.x % 32; i < count_; i += 32) n += __ldg(numbers_ + i) >= x ? 1.0f : 0.0f;
    }
    return __reduce_add_sync(~0u, int(n));
  }

  // It returns where the first so many numbers of a key end.
  __device__ __forceinline__ int end_of(std::uint32_t key, int wanted) const {
    if (wanted == 0) return 0;
    const int lane = threadIdx.x % 32;
    for (int first = 0;; first += 32) {
      const bool is_equal = first + lane < count_ && this->key(first + lane) == key;
      const unsigned equal = __ballot_sync(~0u, is_equal);
      const bool is_last = is_equal && __popc(equal & ((1u << lane) - 1)) == wanted - 1;
      if (const unsigned last = __ballot_sync(~0u, is_last)) return first + __ffs(last);
      wanted -= __popc(equal);
    }
  }

 public:
  // It returns how many numbers a copy of so many has room for.
  static __host__ __device__ constexpr std::int64_t padded(std::int64_t count) {
    return (count + kPadding - 1) / kPadding * kPadding;
  }

  __device__ __forceinline__ Ranking(const float* numbers, int count, float* copy)
      : numbers_(kShared ? copy : numbers), count_(count) {
    const int end = kShared ? int(padded(count)) : count;
    float nans = 0, lowest = INFINITY, highest = -INFINITY;  // the latter two of the others
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < end; i += 32) {
      const float x = i < count ? __ldg(numbers + i) : __uint_as_float(kNanKey);
      if constexpr (kShared) copy[i] = x;
      nans += x != x ? 1.0f : 0.0f;
      lowest = fminf(lowest, x);
      highest = fmaxf(highest, x);
    }
    nans_ = __reduce_add_sync(~0u, int(nans)) - (end - count);
    lowest_ = __reduce_min_sync(~0u, key_of(lowest));
    highest_ = __reduce_max_sync(~0u, key_of(highest));
    __syncwarp();  // all lanes see the copy
  }

  __device__ __forceinline__ std::uint32_t key(int i) const {
    return key_of(kShared ? numbers_[i] : __ldg(numbers_ + i));
  }

  __device__ __forceinline__ Cut best(int wanted) const {
    constexpr int kStepsByNumber = 16;
    if (wanted <= nans_) return {kNanKey, end_of(kNanKey, wanted)};
    if (wanted >= count_) return {0, INT_MAX};
    wanted -= nans_;
    std::uint32_t low = lowest_, high = highest_ + 1;
    int from_low = count_ - nans_,
        from_high = 0;  // so many are at least low: as many as wanted, or more; and high: fewer
    for (int step = 0; high - low > 1; ++step) {
      // Half of the way is guessed from the counts, which is near what is sought as long as numbers are of like size.
      // The middle of the keys halves any range.
      std::uint32_t middle = low + (high - low) / 2;
      if (step < kStepsByNumber) {
        const float share = 0.25f + 0.5f * __fdividef(float(from_low - wanted), float(from_low - from_high));
        const float guess = fmaf(number_of(high) - number_of(low), share, number_of(low));
        middle = max(low + 1, min(high - 1, key_of(guess)));
      }
      const int n = count_from(number_of(middle));
      if (n == wanted) return {middle, INT_MAX};
      if (n > wanted) {
        low = middle;
        from_low = n;
      } else {
        high = middle;
        from_high = n;
      }
    }
    return {low, end_of(low, wanted - from_high)};
  }
};

}  // namespace attnx::cuda
