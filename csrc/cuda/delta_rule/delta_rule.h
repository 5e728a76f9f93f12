// This is the gated delta rule.
#pragma once

#include <cstddef>

#include "attnx/delta_rule_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

std::size_t delta_rule_forward_workspace(const DeltaRuleForwardParams& params, const Launch& launch);
void delta_rule_forward(const DeltaRuleForwardParams& params, const Launch& launch);

std::size_t delta_rule_backward_workspace(const DeltaRuleBackwardParams& params, const Launch& launch);
void delta_rule_backward(const DeltaRuleBackwardParams& params, const Launch& launch);

}  // namespace attnx::cuda
