// The steps are the states of segments of keys and their sums, what the backward needs of rows, the gradients of
// queries, T of segments of queries and its sums, from the last to the first, the gradients of keys and values, and
// what lies before the features. T takes the place of the states.
#include <algorithm>

#include "cuda/dispatch/range.h"
#include "cuda/dispatch/workspace.h"
#include "cuda/linear_state/kernels.h"
#include "cuda/linear_state/linear_state.h"
#include "cuda/linear_state/plan.h"

namespace attnx::cuda {

namespace {

int most_bytes(const LinearStateArguments& args) {
  return std::max(
      {state_sums_bytes(args), state_output_bytes(args), state_grad_query_bytes(args), state_grad_keys_bytes(args)});
}

struct BackwardPlan {
  LinearStateArguments of_keys, of_queries;  // segments
  StateRowNumbers rows;
  float *whole, *grad_query, *grad_key;
  std::size_t workspace;

  BackwardPlan(const LinearStateBackwardParams& p, void* memory)
      : of_keys(plan_tiles(p, most_bytes)), of_queries(of_keys) {
    plan_segments(of_keys, p.length_k);
    plan_segments(of_queries, p.length_q);
    WorkspaceLayout layout;
    const auto place = [&](std::int64_t n) { return layout.place<float>(memory, n); };
    const std::int64_t states = p.batch * p.heads_k * of_keys.state_size, rows_q = p.batch * p.heads_q * p.length_q;
    of_keys.states = of_queries.states = place(std::max(of_keys.segments, of_queries.segments) * states);
    whole = place(states);
    rows = {p.grad_output, place(rows_q), place(of_keys.tiles * rows_q)};
    grad_query = place(of_keys.tiles * rows_q * p.head_dim);
    grad_key = place(of_keys.tiles * p.batch * p.heads_k * p.length_k * p.head_dim);
    workspace = layout.bytes();
  }
};

StateGradArguments with_rows(const LinearStateArguments& segments, const StateRowNumbers& rows, const Tensor& whole) {
  StateGradArguments args{segments};
  args.rows = rows;
  args.whole = whole;
  return args;
}

}  // namespace

std::size_t linear_state_backward_workspace(const LinearStateBackwardParams& p, const Launch&) {
  return BackwardPlan(p, nullptr).workspace;
}

void linear_state_backward(const LinearStateBackwardParams& p, const Launch& launch) {
  const Range range("attnx::linear_attention_backward");
  const BackwardPlan plan(p, launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const std::int64_t size = plan.of_keys.state_size;
  const Tensor whole{plan.whole, p.heads_k * size, size, p.value_dim + 1};
  const bool needs_sums = !p.is_causal || plan.of_keys.segments > 1;
  const auto last = static_cast<float*>(p.grad_initial_state);

  if (needs_sums) {
    launch_state_sums(plan.of_keys, stream);
    launch_state_prefix(plan.of_keys, p.initial_state, p.is_causal ? nullptr : plan.whole, stream);
  }
  const Tensor& state = p.is_causal ? p.initial_state : whole;
  if (p.grad_output.data) {
    StateRowArguments of_rows{plan.of_queries};
    of_rows.whole = state;
    of_rows.rows = plan.rows;
    launch_state_rows(of_rows, stream);
  }
  StateGradArguments of_queries = with_rows(plan.of_queries, plan.rows, state);
  of_queries.grad_rows = plan.grad_query;
  launch_state_grad_query(of_queries, stream);

  if (needs_sums) {
    of_queries.reversed = true;
    launch_state_grad_sums(of_queries, stream);
    launch_state_prefix(of_queries, p.grad_state, p.is_causal ? nullptr : last, stream);
  }
  StateGradArguments of_keys = with_rows(plan.of_keys, plan.rows, whole);
  if (p.is_causal) {
    of_keys.whole = p.grad_state;
    of_keys.last = last;
  } else {
    of_keys.whole.data = last;
  }
  of_keys.grad_rows = plan.grad_key;
  of_keys.grad_value = p.grad_value;
  launch_state_grad_keys(of_keys, stream);

  const int tiles = plan.of_keys.tiles;
  launch_state_finish({p, p.query, p.grad_query, plan.grad_query, p.heads_q, p.length_q, tiles}, plan.of_keys.scale,
                      stream);
  launch_state_finish({p, p.key, p.grad_key, plan.grad_key, p.heads_k, p.length_k, tiles}, 1, stream);
}

}  // namespace attnx::cuda
