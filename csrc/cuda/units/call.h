// This is what dispatch tells a unit of kernels, and the list of units: there is one for each score, dtype and padded
// head dimension. CMake writes their files, of up to three head dimensions, so that each compiles in seconds; nothing
// but them includes a mainloop.
#pragma once

#include <cuda_runtime_api.h>

#include "attnx/jvp_params.h"
#include "cuda/mainloop/forward_arguments.h"
#include "cuda/mainloop/grad_query_arguments.h"
#include "cuda/mainloop/sm90/forward_arguments.h"

namespace attnx::cuda {

// This picks one of a unit's instantiations.
struct Variant {
  bool wide, listed, aligned;
  bool terms;                     // in the logits
  bool tables;                    // of them, by distance
  std::int64_t block_q, block_k;  // of lists
};

struct ForwardCall {
  const ForwardParams& params;
  ForwardGeometry geometry;
  LogitScaling scaling;
  PartialResults partial;
  ForwardSchedule schedule;  // of blocks that stay
  Variant variant;
  std::int64_t blocks;
  cudaStream_t stream;
};

// This makes the derivative along a direction, too.
struct JvpForwardCall {
  const JvpParams& params;
  ForwardGeometry geometry;
  LogitScaling scaling;
  bool aligned;
  std::int64_t blocks;
  cudaStream_t stream;
};

// Over a staircase cache, the variant says whether query and output are aligned.
using StaircaseForwardCall = ForwardCall;

struct BackwardCall {
  const BackwardParams& params;
  BackwardGeometry geometry;
  LogitScaling scaling;
  BackwardScratch scratch;
  const int* list_order;
  int rows_of_tile;
  Variant variant;
  std::int64_t blocks;
  cudaStream_t stream;
};

template <Score kScore, DType kDType, int kHeadDim>
void launch_forward_sm80(const ForwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_forward_sm90(const ForwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_jvp_forward_sm80(const JvpForwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_staircase_forward_sm80(const StaircaseForwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_staircase_forward_sm90(const StaircaseForwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_backward_sm80(const BackwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_backward_sm90(const BackwardCall& call);
// These serve calls with terms in their logits.
template <Score kScore, DType kDType, int kHeadDim>
void launch_terms_forward_sm80(const ForwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_terms_forward_sm90(const ForwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_terms_backward_sm80(const BackwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_tables_forward_sm80(const ForwardCall& call);
template <Score kScore, DType kDType, int kHeadDim>
void launch_tables_backward_sm80(const BackwardCall& call);

// These passes around the backward depend on the score, or on the tiles of its mainloop.
template <Score kScore>
void launch_row_terms(const BackwardCall& call);
template <DType kDType, int kHeadDim>
void launch_grad_query_sm80(const GradQueryArguments& args, Variant variant, cudaStream_t stream);
template <DType kDType, int kHeadDim>
void launch_grad_query_sm90(const GradQueryArguments& args, Variant variant, cudaStream_t stream);

}  // namespace attnx::cuda
