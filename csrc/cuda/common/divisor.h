// This divides by a number that is known at launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace attnx::cuda {

// It divides 0 <= n < 2^31 by a multiplication (Granlund and Montgomery 1994).
class Divisor {
  std::uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;

 public:
  Divisor() = default;
  explicit Divisor(std::int64_t divisor) : divisor_(std::uint32_t(divisor)) {
    while ((std::uint64_t(1) << shift_) < divisor_) ++shift_;
    multiplier_ = std::uint32_t((std::uint64_t(1) << 32) * ((std::uint64_t(1) << shift_) - divisor_) / divisor_ + 1);
  }

  __host__ __device__ __forceinline__ int divisor() const { return int(divisor_); }
#ifdef __CUDACC__
  __device__ __forceinline__ int divide(int n) const { return int((__umulhi(n, multiplier_) + n) >> shift_); }
  // This divides n in place and returns the remainder.
  __device__ __forceinline__ int split(int& n) const {
    const int before = n;
    n = divide(before);
    return before - n * divisor();
  }
#endif
};

}  // namespace attnx::cuda
