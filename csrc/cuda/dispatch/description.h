// This describes kernels that a plan leads to.
#pragma once

#include "cuda/attention.h"
#include "cuda/dispatch/plan.h"

namespace attnx::cuda {

// The direction is "forward" or "backward".
KernelDescription describe(const char* direction, const Plan& plan, int splits);

}  // namespace attnx::cuda
