// Each launcher here launches one kernel of the gated delta rule.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/element.h"
#include "cuda/delta_rule/arguments.h"

namespace attnx::cuda {

// This makes outputs and the last state, a chunk at a time.
struct DeltaOutputArguments : DeltaRuleArguments {
  Tensor output;
  float* state;
};
int delta_output_bytes(const DeltaRuleArguments& args);
void launch_delta_outputs(const DeltaOutputArguments& args, cudaStream_t stream);

// This does the same token by token, for few of them.
void launch_delta_steps(const DeltaRuleForwardParams& params, cudaStream_t stream);

// This calls action.template operator()<Input>().
template <class Action>
void with_delta_dtype(DType dtype, const Action& action) {
  dtype == DType::kBFloat16 ? action.template operator()<__nv_bfloat16>() : action.template operator()<__half>();
}

}  // namespace attnx::cuda
