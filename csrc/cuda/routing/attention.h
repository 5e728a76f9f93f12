// This runs attention within clusters: the loop over clusters, and around it what belongs to rows rather than slots.
#pragma once

#include "cuda/attention.h"

namespace attnx::cuda {

std::size_t routed_forward_workspace(const ForwardParams& params, const Launch& launch);
void routed_forward(const ForwardParams& params, const Launch& launch);
KernelDescription describe_routed(const ForwardParams& params);

std::size_t routed_backward_workspace(const BackwardParams& params, const Launch& launch);
void routed_backward(const BackwardParams& params, const Launch& launch);
KernelDescription describe_routed(const BackwardParams& params);

}  // namespace attnx::cuda
