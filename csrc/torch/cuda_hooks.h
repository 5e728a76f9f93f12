// The Python module asks these of the CUDA kernels, in builds that have them. This header includes none of torch's.
#pragma once

#include "attnx/api.h"
#include "cuda/attention.h"
#include "cuda/routing/scores.h"

namespace attnx::ops {

ATTNX_API bool cuda_emulated();
ATTNX_API cuda::KernelDescription describe_cuda_kernel(const ForwardParams& params);
ATTNX_API cuda::KernelDescription describe_cuda_kernel(const BackwardParams& params);
ATTNX_API std::string cuda_mainloop();
ATTNX_API void set_cuda_mainloop(const std::string& name);
ATTNX_API void cuda_sigmoid_weights(const float* logits, float* weights, std::int64_t n, DType dtype, bool exact);
ATTNX_API void cuda_critical_blocks(const CriticalBlocksParams& params);
// It returns the bytes that the workspace takes, and does no more where there is none.
ATTNX_API std::size_t cuda_block_products(const BlockMapParams& params, float* products, void* workspace);
ATTNX_API void cuda_normalise_rows(const RouteParams& params, float* normalised);
ATTNX_API void cuda_pad_centroids(const RouteParams& params, float* padded);
ATTNX_API void cuda_routing_scores(const cuda::ScoreParams& params);

}  // namespace attnx::ops
