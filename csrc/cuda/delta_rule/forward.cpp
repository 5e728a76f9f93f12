#include "cuda/delta_rule/delta_rule.h"
#include "cuda/delta_rule/kernels.h"
#include "cuda/delta_rule/plan.h"
#include "cuda/dispatch/range.h"

namespace attnx::cuda {

namespace {

constexpr std::int64_t kFewTokens = 8;  // more of them are a chunk

}  // namespace

std::size_t delta_rule_forward_workspace(const DeltaRuleForwardParams&, const Launch&) { return 0; }

void delta_rule_forward(const DeltaRuleForwardParams& p, const Launch& launch) {
  const Range range("attnx::gated_delta_rule");
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (p.length <= kFewTokens) return launch_delta_steps(p, stream);
  launch_delta_outputs({plan_delta_rule(p, delta_output_bytes), p.output, static_cast<float*>(p.state)}, stream);
}

}  // namespace attnx::cuda
