// This pass before the backward divides the gradient of each row of the output by the number of its clusters.
#pragma once

#include <cuda_runtime_api.h>

#include "attnx/params.h"

namespace attnx::cuda {

struct ShareRowsArguments {
  std::int64_t batch, heads, rows;
  int features, padded;        // padded: of a row of `to`
  const std::int32_t* starts;  // [batch, heads, rows + 1]: differences count a row's clusters
  Tensor from;                 // [batch, heads, rows, features]
  void* to;                    // [batch, heads, rows, padded]
};

void launch_share_rows(const ShareRowsArguments& args, DType dtype, cudaStream_t stream);

}  // namespace attnx::cuda
