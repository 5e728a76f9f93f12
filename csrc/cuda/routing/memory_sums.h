// This pass adds up what the clusters have for the keys that they share, the memory.
#pragma once

#include <cuda_runtime_api.h>

#include "attnx/params.h"

namespace attnx::cuda {

struct MemorySumsArguments {
  std::int64_t batch, heads, clusters;
  int memory, features, group;  // group: query heads that share a head of the memory
  Tensor from;                  // [batch, heads, cluster * memory, features]
  Tensor to;                    // [heads / group, memory, features]
};

void launch_memory_sums(const MemorySumsArguments& args, DType dtype, cudaStream_t stream);

}  // namespace attnx::cuda
