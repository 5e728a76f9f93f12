// A plan of the gated delta rule says into which tiles of columns and chunks of tokens a call falls.
#pragma once

#include "cuda/delta_rule/arguments.h"

namespace attnx::cuda {

// The widest tile and largest chunk whose memory, by bytes(arguments), a block can have.
DeltaRuleArguments plan_delta_rule(const DeltaRuleParams& params, int (*bytes)(const DeltaRuleArguments&));

}  // namespace attnx::cuda
