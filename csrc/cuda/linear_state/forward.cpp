// Where attention is causal the steps are the states of segments, their sums, and outputs, each segment of queries
// going on from the state before it; a single segment needs the last step alone. Else the state of all keys comes
// first.
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/workspace.h"
#include "cuda/linear_state/kernels.h"
#include "cuda/linear_state/linear_state.h"
#include "cuda/linear_state/plan.h"

namespace attnx::cuda {

namespace {

struct ForwardPlan {
  LinearStateArguments sums, outputs;
  float* whole = nullptr;  // the state of all keys, where nobody wants it
  std::size_t workspace;

  ForwardPlan(const LinearStateForwardParams& p, void* memory)
      : sums(plan_tiles(p, state_sums_bytes)), outputs(plan_tiles(p, state_output_bytes)) {
    plan_segments(outputs, p.length_q);
    if (p.is_causal) {
      sums.segments = outputs.segments;
      sums.of_segment = outputs.of_segment;
    } else {
      plan_segments(sums, p.length_k);
    }
    WorkspaceLayout layout;
    const std::int64_t heads = p.batch * p.heads_k;
    if (needs_sums()) sums.states = layout.place<float>(memory, heads * sums.segments * sums.state_size);
    if (!p.is_causal && !p.state) whole = layout.place<float>(memory, heads * sums.state_size);
    outputs.states = sums.states;
    workspace = layout.bytes();
  }
  bool needs_sums() const { return !sums.p.is_causal || sums.segments > 1; }
};

}  // namespace

std::size_t linear_state_forward_workspace(const LinearStateForwardParams& p, const Launch&) {
  return ForwardPlan(p, nullptr).workspace;
}

void linear_state_forward(const LinearStateForwardParams& p, const Launch& launch) {
  const Range range("attnx::linear_attention");
  const ForwardPlan plan(p, launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  StateOutputArguments outputs{plan.outputs};
  outputs.output = p.output;
  if (plan.needs_sums()) launch_state_sums(plan.sums, stream);
  if (p.is_causal) {
    if (plan.needs_sums()) launch_state_prefix(plan.sums, p.initial_state, nullptr, stream);
    outputs.whole = p.initial_state;
    outputs.last = static_cast<float*>(p.state);
  } else {
    const std::int64_t columns = p.value_dim + 1, size = plan.sums.state_size;
    outputs.whole = {p.state ? p.state : plan.whole, p.heads_k * size, size, columns};
    launch_state_prefix(plan.sums, p.initial_state, outputs.whole.data, stream);
  }
  launch_state_outputs(outputs, stream);
}

}  // namespace attnx::cuda
