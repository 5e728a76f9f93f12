// This runs the sums over scores.
#pragma once

#include "cuda/dispatch/plan.h"

namespace attnx::cuda {

// This makes the gradients that a backward has by sums over gradients of logits, where it has any. It comes after the
// pass over the rows.
void launch_grad_sums(const BackwardParams& params, const BackwardPlan& plan, cudaStream_t stream);

// This makes the sums that rows of the sharpened softplus need before their first gradient. It comes after the pass
// over the rows, too.
void launch_sharpened_sums(const BackwardParams& params, const BackwardPlan& plan, cudaStream_t stream);

}  // namespace attnx::cuda
