// This lays matrices out in a block's shared memory, the same for the host, which asks how much they are, and for the
// kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/split_product.h"

namespace attnx::cuda {

__host__ __device__ constexpr int round_to(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

class SharedArena {
  char* memory_;
  int bytes_ = 0;

 public:
  __host__ __device__ explicit SharedArena(void* memory) : memory_(static_cast<char*>(memory)) {}
  __host__ __device__ int bytes() const { return bytes_; }

  // It is null on the host, which has no memory.
  template <class T>
  __host__ __device__ T* take(int count) {
    char* const at = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += round_to(count * int(sizeof(T)), 16);
    return reinterpret_cast<T*>(at);
  }
  // The rows of this one are read by lanes that differ in row and step: operand A, or operand B by columns.
  __host__ __device__ SharedMatrix take_rows(int rows, int columns) {
    const int pitch = round_to(columns + 4, 8) - 4;
    return {take<float>(rows * pitch), pitch};
  }
  // The rows of this one are steps of operand B.
  __host__ __device__ SharedMatrix take_steps(int rows, int columns) {
    const int pitch = round_to(columns + 8, 16) - 8;
    return {take<float>(rows * pitch), pitch};
  }
};

}  // namespace attnx::cuda
