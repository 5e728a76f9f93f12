#include "cuda/dispatch/description.h"

#include "cuda/routing/attention.h"
#include "cuda/staircase/attention.h"

namespace attnx::cuda {

KernelDescription describe(const char* direction, const Plan& plan, int splits) {
  const std::string mainloop = name_of(plan.mainloop);
  return {"attnx_" + std::string(direction) + "_" + mainloop,
          mainloop,
          plan.tile.rows,
          plan.tile.keys,
          plan.head_dim,
          plan.variant.aligned,
          splits,
          plan.why_not_sm90};
}

KernelDescription describe(const ForwardParams& params) {
  if (params.cache) return describe_staircase(params);
  if (params.gather) return describe_routed(params);
  const ForwardPlan plan = make_plan(params, asked_mainloop(), nullptr);
  return describe("forward", plan, plan.geometry.splits.divisor());
}

KernelDescription describe(const BackwardParams& params) {
  if (params.gather) return describe_routed(params);
  return describe("backward", make_plan(params, asked_mainloop(), false, nullptr), 1);
}

}  // namespace attnx::cuda
