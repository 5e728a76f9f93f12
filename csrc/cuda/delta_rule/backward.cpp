// The steps for a section of heads are states forwards, gradients of states backwards, and what each chunk makes of
// both.
#include <algorithm>

#include "cuda/delta_rule/delta_rule.h"
#include "cuda/delta_rule/gradients.h"
#include "cuda/delta_rule/plan.h"
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/workspace.h"

namespace attnx::cuda {

namespace {

constexpr std::int64_t kSectionBytes = std::int64_t(256) << 20;  // of states of heads

int most_bytes(const DeltaRuleArguments& args) {
  return std::max({delta_output_bytes(args), delta_grad_values_bytes(args), delta_grad_keys_bytes(args)});
}

struct BackwardPlan {
  DeltaGradArguments arguments{};
  std::int64_t heads;  // of the call
  std::size_t workspace;

  BackwardPlan(const DeltaRuleBackwardParams& p, void* memory) : heads(p.batch * p.heads_v) {
    DeltaGradArguments& a = arguments;
    static_cast<DeltaRuleArguments&>(a) = plan_delta_rule(p, most_bytes);
    const std::int64_t states = a.chunks * p.key_dim * p.value_dim, group = p.heads_v / p.heads_k;
    const std::int64_t fitting = kSectionBytes / std::max<std::int64_t>(2 * states * sizeof(float), 1) / group * group;
    a.heads = std::min(std::max(fitting, group), heads);
    WorkspaceLayout layout;
    const auto place = [&](std::int64_t of_head) { return layout.place<float>(memory, a.heads * of_head); };
    a.states = place(states);
    a.grad_states = place(states);
    a.differences = place(p.length * p.value_dim);
    a.z = place(p.length * p.value_dim);
    a.grad_queries = place(p.length * p.key_dim);
    a.grad_keys = place(p.length * p.key_dim);
    workspace = layout.bytes();
    a.grad_output = p.grad_output;
    a.grad_state = p.grad_state;
    a.grad_query = p.grad_query;
    a.grad_key = p.grad_key;
    a.grad_value = p.grad_value;
    a.grad_log_decay = static_cast<float*>(p.grad_log_decay);
    a.grad_beta = static_cast<float*>(p.grad_beta);
    a.grad_initial_state = static_cast<float*>(p.grad_initial_state);
  }
};

}  // namespace

std::size_t delta_rule_backward_workspace(const DeltaRuleBackwardParams& p, const Launch&) {
  return BackwardPlan(p, nullptr).workspace;
}

void delta_rule_backward(const DeltaRuleBackwardParams& p, const Launch& launch) {
  const Range range("attnx::gated_delta_rule_backward");
  const BackwardPlan plan(p, launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  DeltaGradArguments section = plan.arguments;
  for (; section.first_head < plan.heads; section.first_head += plan.arguments.heads) {
    section.heads = std::min(plan.arguments.heads, plan.heads - section.first_head);
    launch_delta_states(section, stream);
    launch_delta_grad_values(section, stream);
    launch_delta_grad_keys(section, stream);
    launch_delta_finish(section, stream);
  }
}

}  // namespace attnx::cuda
