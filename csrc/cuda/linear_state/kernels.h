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

// With y = N / n of a row, G = [-(dO . y) / n, dO / n] is the gradient of [n, N]. These two numbers are left of each
// row of queries, of the latter a part by every tile.
struct StateRowNumbers {
  Tensor grad_output;
  float* sums;  // n: [batch * heads_q][length_q]
  float* dots;  // dO . y: [tiles][batch * heads_q][length_q]
};
struct StateRowArguments : StateOutputArguments {  // `output` is not written
  StateRowNumbers rows;
};
void launch_state_rows(const StateRowArguments& args, cudaStream_t stream);

// This makes T of all segments of queries, the sum of phi(q) G^T.
struct StateGradArguments : LinearStateArguments {
  StateRowNumbers rows;
  Tensor whole;           // the state to go on from, as for outputs: S, or T
  float* last = nullptr;  // of T
  float* grad_rows;       // of queries, or keys, before their map: [tiles][batch * heads][length][head_dim]
  Tensor grad_value;
};
void launch_state_grad_sums(const StateGradArguments& args, cudaStream_t stream);

// These make the gradients of queries from S, forwards, and of keys and values from T, backwards.
int state_grad_query_bytes(const LinearStateArguments& args);
void launch_state_grad_query(const StateGradArguments& args, cudaStream_t stream);
int state_grad_keys_bytes(const LinearStateArguments& args);
void launch_state_grad_keys(const StateGradArguments& args, cudaStream_t stream);

// This adds up the parts of the tiles, and goes back through the map of features; gradients are times the factor.
struct StateFinishArguments {
  LinearStateParams p;
  Tensor from, to;  // the rows, and their gradients
  const float* parts;
  std::int64_t heads, length;
  int tiles;
};
void launch_state_finish(const StateFinishArguments& args, float factor, cudaStream_t stream);

// This calls action.template operator()<Input, kTaylor>().
template <class Action>
void with_state_kernel(const LinearStateParams& p, const Action& action) {
  const auto with_dtype = [&]<class Input>(Input) {
    p.taylor ? action.template operator()<Input, true>() : action.template operator()<Input, false>();
  };
  p.dtype == DType::kBFloat16 ? with_dtype(__nv_bfloat16()) : with_dtype(__half());
}

}  // namespace attnx::cuda
