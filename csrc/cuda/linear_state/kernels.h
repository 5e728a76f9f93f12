// Each launcher here launches one kernel of linear attention with a state.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/element.h"
#include "cuda/linear_state/arguments.h"

namespace attnx::cuda {

// This makes the states of all segments of keys.
int state_sums_bytes(const LinearStateArguments& args);
void launch_state_sums(const LinearStateArguments& args, cudaStream_t stream);

// Each state becomes the sum of the one before all segments, which may be null, and of those of earlier segments. The
// sum of all goes to `last`, unless that is null.
void launch_state_prefix(const LinearStateArguments& args, const Tensor& before, void* last, cudaStream_t stream);

// This makes the outputs of segments of queries: where attention is causal each goes on from the state before it, or
// from the initial one, if it is the only one; else from `whole`.
struct StateOutputArguments : LinearStateArguments {
  Tensor output;
  Tensor whole;
  float* last = nullptr;  // where the state after the last token goes; null: nowhere
};
int state_output_bytes(const LinearStateArguments& args);
void launch_state_outputs(const StateOutputArguments& args, cudaStream_t stream);

// This calls action.template operator()<Input, kTaylor>().
template <class Action>
void with_state_kernel(const LinearStateParams& p, const Action& action) {
  const auto with_dtype = [&]<class Input>(Input) {
    p.taylor ? action.template operator()<Input, true>() : action.template operator()<Input, false>();
  };
  p.dtype == DType::kBFloat16 ? with_dtype(__nv_bfloat16()) : with_dtype(__half());
}

}  // namespace attnx::cuda
