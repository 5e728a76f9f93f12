// This pass before the backward computes for each slot of a cluster what attnx_row_terms does for a row.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/geometry.h"
#include "cuda/tiles/cluster_tile.h"

namespace attnx::cuda {

struct ClusterRowTermsArguments {
  ClusterTable tiles;  // of rows
  std::int64_t rows;   // of a head
  int rows_of_tile, features, padded;
  const std::int32_t* indices;              // [batch, heads, slots]
  const void* output;                       // [batch, heads, slots, padded]
  const void* grad_output;                  // [batch, heads, rows, padded]: shares
  const float *logsumexp, *grad_logsumexp;  // [batch, heads, slots]; of softmax
  float *offset, *delta;                    // as in BackwardScratch
};

void launch_cluster_row_terms(const ClusterRowTermsArguments& args, const AttentionParams& params, std::int64_t tiles,
                              cudaStream_t stream);

}  // namespace attnx::cuda
