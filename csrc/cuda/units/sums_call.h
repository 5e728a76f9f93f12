// This is what dispatch tells a unit of sums over scores: there is one for each score, dtype and padded head dimension.
#pragma once

#include <cuda_runtime_api.h>

#include "attnx/weights_params.h"
#include "cuda/mainloop/sums_arguments.h"

namespace attnx::cuda {

// Chosen keys have kernels in these units alone: fewer features than 128 are padded, which saves their code.
inline constexpr int kChosenKeysHeadDims[] = {128, 256};

// The sums are those of one of these.
struct SumsCall {
  const KeyWeightsParams* key_weights;
  const RowWeightsParams* row_weights;
  const MaxLogitsParams* max_logits;
  const ChosenKeysParams* chosen_keys;
  Geometry geometry;
  LogitScaling scaling;
  bool aligned;
  cudaStream_t stream;
};

// These tell whether each row has numbers of attn_mask of its own, so that they are not numbers by key, and whether
// they are numbers by distance.
inline bool has_gradient_of_pairs(const BackwardParams& p) {
  return p.grad_attn_mask.data && p.grad_attn_mask.row_stride != 0 && !p.grad_attn_mask.by_distance();
}
inline bool has_gradient_of_distances(const BackwardParams& p) {
  return p.grad_attn_mask.data && p.grad_attn_mask.by_distance();
}

// This makes the gradients of what logits get, and sums of those that are by key, as BackwardPlan says.
struct GradSumsCall {
  const BackwardParams& params;
  Geometry geometry;
  LogitScaling scaling;
  RowsOfBackward rows;
  float *added_sums, *factor_sums, *distance_sums;
  cudaStream_t stream;
};

// This makes what sharpened rows need, before a forward or before a backward.
struct SoftplusRowsCall {
  const SoftplusRowsParams* forward;
  const BackwardParams* backward;
  Geometry geometry;
  LogitScaling scaling;
  RowsOfSharpened rows;  // of a backward
  cudaStream_t stream;
};

template <Score kScore, DType kDType, int kHeadDim>
void launch_softplus_rows_sm80(const SoftplusRowsCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_sums_sm80(const SumsCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_grad_sums_sm80(const GradSumsCall& call);

}  // namespace attnx::cuda
