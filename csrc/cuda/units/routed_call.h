// This is what dispatch tells a unit of the loop over clusters: there is one for each score, dtype and padded head
// dimension.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/mainloop/backward_arguments.h"
#include "cuda/mainloop/forward_arguments.h"
#include "cuda/mainloop/sm90/forward_arguments.h"
#include "cuda/storage/gathered_tensors.h"
#include "cuda/tiles/cluster_tile.h"

namespace attnx::cuda {

struct RoutedForwardCall {
  const ForwardParams& params;
  ForwardGeometry geometry;
  LogitScaling scaling;
  GatheredTensor query, key, value;
  Tensor output, logsumexp;  // by slot
  ClusterTable tiles;
  ForwardSchedule schedule;  // of blocks that stay
  bool aligned, wide;
  std::int64_t blocks;
  cudaStream_t stream;
};

struct RoutedBackwardCall {
  BackwardGeometry geometry;
  LogitScaling scaling;
  BackwardScratch scratch;
  GatheredTensor query, key, value, grad_output;
  Tensor grad_query;  // by slot
  KeyPlaces grad_key, grad_value;
  ClusterTable rows, keys;  // tables of tiles of rows and of keys
  std::int64_t row_blocks, key_blocks;
  bool aligned, wide;
  cudaStream_t stream;
};

template <Score kScore, DType kDType, int kHeadDim>
void launch_routed_forward_sm80(const RoutedForwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_routed_forward_sm90(const RoutedForwardCall& call);
// This makes dK and dV, and then dQ from its sums.
template <Score kScore, DType kDType, int kHeadDim>
void launch_routed_backward_sm80(const RoutedBackwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_routed_backward_sm90(const RoutedBackwardCall& call);

}  // namespace attnx::cuda
