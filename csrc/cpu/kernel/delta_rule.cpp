// This unit is compiled once for each instruction set, and picks the types.
#include "delta_rule/backward.h"
#include "delta_rule/forward.h"
#include "dtype.h"

namespace attnx::cpu::ATTNX_ISA {

std::size_t delta_rule_forward_workspace(const DeltaRuleForwardParams& p, const Executor& executor) {
  return with_kernel<DeltaRuleForward>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void delta_rule_forward(const DeltaRuleForwardParams& p, const Executor& executor, char* workspace) {
  with_kernel<DeltaRuleForward>(p, executor, [&](const auto& f) { f.run(workspace); });
}

std::size_t delta_rule_backward_workspace(const DeltaRuleBackwardParams& p, const Executor& executor) {
  return with_kernel<DeltaRuleBackward>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void delta_rule_backward(const DeltaRuleBackwardParams& p, const Executor& executor, char* workspace) {
  with_kernel<DeltaRuleBackward>(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA
