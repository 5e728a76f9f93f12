// This sorts items by keys. Items of the same key stay in their order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/dispatch/workspace.h"

namespace attnx::cuda {

struct SortedPairs {
  std::int64_t count;
  int bits;  // of a key; those above are 0
  std::uint32_t* keys[2];
  std::int32_t* items[2];
  char* scratch;
  std::size_t scratch_bytes = 0;

  SortedPairs(std::int64_t count, int bits, WorkspaceLayout& layout, void* workspace);

  struct Result {
    const std::uint32_t* keys;
    const std::int32_t* items;
  };
  // This sorts what keys[0] and items[0] hold, which are lost.
  Result sort(cudaStream_t stream) const;
};

}  // namespace attnx::cuda
