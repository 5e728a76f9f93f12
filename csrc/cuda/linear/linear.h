// This is linear attention over a scope of blocks, the second branch of sparse-linear attention.
#pragma once

#include <cstddef>

#include "attnx/params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

std::size_t linear_forward_workspace(const LinearForwardParams& params, const Launch& launch);
void linear_forward(const LinearForwardParams& params, const Launch& launch);

std::size_t linear_backward_workspace(const LinearBackwardParams& params, const Launch& launch);
void linear_backward(const LinearBackwardParams& params, const Launch& launch);

}  // namespace attnx::cuda
