// The steps for a section of heads are states of blocks of keys, their sums over scopes, gradients of queries, states
// of blocks of queries, their sums by the transposed scopes, and gradients of keys and values. The second states and
// sums take the place of the sums and states before them.
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/linear/linear.h"
#include "cuda/linear/plan.h"

namespace attnx::cuda {

namespace {

LinearPlan make_plan(const LinearBackwardParams& p, void* workspace) {
  const bool aligned = are_aligned(p, {p.query}, {p.key}, {p.value}) &&
                       is_aligned(p, p.output, p.heads_q, p.value_dim) &&
                       is_aligned(p, p.grad_output, p.heads_q, p.value_dim);
  return plan_linear(p, aligned, true, workspace);
}

}  // namespace

std::size_t linear_backward_workspace(const LinearBackwardParams& p, const Launch&) {
  return make_plan(p, nullptr).workspace;
}

void linear_backward(const LinearBackwardParams& p, const Launch& launch) {
  const Range range("attnx::linear_attention_backward");
  const LinearPlan plan = make_plan(p, launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  launch_linear_scope(plan.arguments, p.dtype, stream);
  plan.for_each_section([&](const LinearArguments& section) {
    const LinearGradArguments gradients{section,  p.query,      p.key,      p.value,     p.grad_output,
                                        p.output, p.grad_query, p.grad_key, p.grad_value};
    launch_linear_states({section, p.key, p.value, false}, p.dtype, stream);
    launch_linear_product(section, false, p.dtype, stream);
    launch_linear_grad_query(gradients, p.dtype, stream);
    launch_linear_states({section, p.query, p.grad_output, true}, p.dtype, stream);
    launch_linear_product(section, true, p.dtype, stream);
    if (p.dtype == DType::kBFloat16)
      launch_linear_grad_keys<DType::kBFloat16>(gradients, stream);
    else
      launch_linear_grad_keys<DType::kFloat16>(gradients, stream);
  });
}

}  // namespace attnx::cuda
