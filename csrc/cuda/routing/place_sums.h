// This pass adds up what the clusters have for each row, through the inverse of their lists.
#pragma once

#include <cuda_runtime_api.h>

#include "attnx/params.h"

namespace attnx::cuda {

struct PlaceSumsArguments {
  std::int64_t batch, heads, rows, slots;
  int features, group;                  // group: heads of places whose sums a head of rows gets
  const std::int32_t *places, *starts;  // [batch, heads, slots], [batch, heads, rows + 1]: the slots that hold a row
  Tensor from;                          // [batch, heads, slots, features]
  Tensor to;                            // [batch, heads / group, rows, features]
  bool is_mean;                         // the sum is divided by the number of places
};

void launch_place_sums(const PlaceSumsArguments& args, DType dtype, cudaStream_t stream);

}  // namespace attnx::cuda
