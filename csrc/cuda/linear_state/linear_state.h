// This is linear attention by a state that sums up all earlier tokens.
#pragma once

#include <cstddef>

#include "attnx/linear_state_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

std::size_t linear_state_forward_workspace(const LinearStateForwardParams& params, const Launch& launch);
void linear_state_forward(const LinearStateForwardParams& params, const Launch& launch);

std::size_t linear_state_backward_workspace(const LinearStateBackwardParams& params, const Launch& launch);
void linear_state_backward(const LinearStateBackwardParams& params, const Launch& launch);

}  // namespace attnx::cuda
