// This plans and launches the forward mainloop over a staircase cache, whose tiles it unpacks.
#pragma once

#include "cuda/dispatch/plan.h"

namespace attnx::cuda {

// The grid depends on what the cache can hold and not on what it holds, so that a captured graph replays it.
ForwardPlan plan_staircase_loop(const ForwardParams& params, std::optional<Mainloop> asked, void* workspace);

void run_staircase_loop(const ForwardParams& params, const ForwardPlan& plan, cudaStream_t stream);

}  // namespace attnx::cuda
