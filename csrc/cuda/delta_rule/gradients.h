// The backward of the gated delta rule keeps this in the workspace, of each head of values of a launch. The formulas
// are those of cpu/kernel/delta_rule/backward.h.
#pragma once

#include "cuda/delta_rule/kernels.h"

namespace attnx::cuda {

struct DeltaGradArguments : DeltaRuleArguments {
  float *states, *grad_states;      // before each chunk, and of that after it: [head][chunk][key_dim][value_dim]
  float *differences, *z;           // D and Z: [head][length][value_dim]
  float *grad_queries, *grad_keys;  // what each head of values has of them: [head][length][key_dim]
  Tensor grad_output, grad_state, grad_query, grad_key, grad_value;
  float *grad_log_decay, *grad_beta, *grad_initial_state;
};

int delta_grad_values_bytes(const DeltaRuleArguments& args);
int delta_grad_keys_bytes(const DeltaRuleArguments& args);

// These make states and D forwards; Z, the gradients of states, and dV backwards; then, each chunk for itself, the
// other gradients; and their sums over the heads of values of a head of keys.
void launch_delta_states(const DeltaGradArguments& args, cudaStream_t stream);
void launch_delta_grad_values(const DeltaGradArguments& args, cudaStream_t stream);
void launch_delta_grad_keys(const DeltaGradArguments& args, cudaStream_t stream);
void launch_delta_finish(const DeltaGradArguments& args, cudaStream_t stream);

}  // namespace attnx::cuda
