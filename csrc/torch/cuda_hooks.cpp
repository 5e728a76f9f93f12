#include "cuda_hooks.h"

#include "cuda/common/mainloop_choice.h"

namespace attnx::ops {

bool cuda_emulated() { return cuda::emulated(); }

cuda::KernelDescription describe_cuda_kernel(const ForwardParams& params) { return cuda::describe(params); }
cuda::KernelDescription describe_cuda_kernel(const BackwardParams& params) { return cuda::describe(params); }

std::string cuda_mainloop() { return cuda::asked_mainloop_name(); }

void set_cuda_mainloop(const std::string& name) { cuda::use_mainloop(name.c_str()); }

void cuda_sigmoid_weights(const float* logits, float* weights, std::int64_t n, DType dtype, bool exact) {
  cuda::sigmoid_weights(logits, weights, n, dtype, exact, {});
}

void cuda_critical_blocks(const CriticalBlocksParams& params) { cuda::critical_blocks(params, {}); }

std::size_t cuda_block_products(const BlockMapParams& params, float* products, void* workspace) {
  cuda::Launch launch;
  launch.workspace = workspace;
  if (workspace) cuda::block_products(params, products, launch);
  return cuda::block_map_workspace(params, launch);
}

void cuda_normalise_rows(const RouteParams& params, float* normalised) { cuda::normalise_rows(params, normalised, {}); }

void cuda_pad_centroids(const RouteParams& params, float* padded) { cuda::pad_centroids(params, padded, {}); }

void cuda_routing_scores(const cuda::ScoreParams& params) { cuda::routing_scores(params, {}); }

}  // namespace attnx::ops
