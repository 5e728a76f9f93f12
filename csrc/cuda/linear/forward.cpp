// The steps for a section of heads are states of blocks of keys, their sums over scopes, and outputs.
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/linear/linear.h"
#include "cuda/linear/plan.h"

namespace attnx::cuda {

namespace {

LinearPlan make_plan(const LinearForwardParams& p, void* workspace) {
  const bool aligned = are_aligned(p, {p.query}, {p.key}, {p.value}) && is_aligned(p, p.output, p.heads_q, p.value_dim);
  return plan_linear(p, aligned, false, workspace);
}

}  // namespace

std::size_t linear_forward_workspace(const LinearForwardParams& p, const Launch&) {
  return make_plan(p, nullptr).workspace;
}

void linear_forward(const LinearForwardParams& p, const Launch& launch) {
  const Range range("attnx::linear_attention");
  const LinearPlan plan = make_plan(p, launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  launch_linear_scope(plan.arguments, p.dtype, stream);
  plan.for_each_section([&](const LinearArguments& section) {
    launch_linear_states({section, p.key, p.value, false}, p.dtype, stream);
    launch_linear_product(section, false, p.dtype, stream);
    launch_linear_output({section, p.query, p.key, p.value, p.output}, p.dtype, stream);
  });
}

}  // namespace attnx::cuda
