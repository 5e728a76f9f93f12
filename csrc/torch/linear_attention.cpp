// This file registers torch.ops.attnx.linear_attention and its backward.
#include "attnx/linear_state_params.h"
#include "results.h"

namespace attnx::ops {

namespace {

constexpr std::int64_t kMostTaylorDim = 64;  // its state has 2145 rows

struct StateInputs {
  StableTensor query, key, value;
  std::optional<StableTensor> initial_state;
  ATTNX_FIELDS(query, key, value, initial_state)
};
struct ReturnState {
  bool return_state;
  ATTNX_FIELDS(return_state)
};
struct LinearOptions {
  std::string feature_map;
  std::optional<double> scale;
  bool is_causal;
  ATTNX_FIELDS(feature_map, scale, is_causal)
};

struct OutputAndState {
  StableTensor output, state;
  ATTNX_FIELDS(output, state)
};
// A result that nobody used has none.
struct GradOutputAndState {
  std::optional<StableTensor> grad_output, grad_state;
  ATTNX_FIELDS(grad_output, grad_state)
};
struct StateGradients {
  StableTensor grad_query, grad_key, grad_value, grad_initial_state;
  ATTNX_FIELDS(grad_query, grad_key, grad_value, grad_initial_state)
};

Target target_of(const StateInputs& x) { return {"linear_attention", x.query}; }

void read_feature_map(const LinearOptions& options, LinearStateParams& p) {
  const std::string& map = options.feature_map;
  check(map == "taylor" || map == "elu" || map == "relu" || map == "softmax",
        "feature_map: expected taylor, elu, relu or softmax, got ", map);
  p.taylor = map == "taylor";
  p.feature_map = map == "softmax" ? FeatureMap::kSoftmax : map == "elu" ? FeatureMap::kElu : FeatureMap::kRelu;
  check(p.taylor || !options.scale, "scale: expected None with feature_map ", map,
        ", whose weights are normalised, got a number");
  check(!p.taylor || p.head_dim <= kMostTaylorDim, "query: expected head_dim of at most ", kMostTaylorDim,
        " with feature_map taylor, got ", p.head_dim);
}

Tensor read_state(const char* name, const StableTensor& x, const StableTensor& query, const LinearStateParams& p) {
  check_dtype(name, x, sum_type(query), " (the type of the sums)");
  check_shape(name, x, {p.batch, p.heads_k, p.features(), p.value_dim + 1});
  check_layout(name, x);
  return view_rows(x);
}

StableTensor empty_state(const StableTensor& query, const LinearStateParams& p, std::int64_t rows) {
  return make_empty(query, std::vector{p.batch, p.heads_k, rows, p.value_dim + 1}, sum_type(query));
}

void read(const StateInputs& x, const LinearOptions& options, LinearStateParams& p) {
  AttentionParams inputs;
  read_inputs(target_of(x), {x.query, x.key, x.value}, Dense(), inputs);
  p.dtype = inputs.dtype;
  p.batch = inputs.batch, p.heads_q = inputs.heads_q, p.heads_k = inputs.heads_k;
  p.length_q = inputs.length_q, p.length_k = inputs.length_k;
  p.head_dim = inputs.head_dim, p.value_dim = inputs.value_dim;
  p.query = inputs.query, p.key = inputs.key, p.value = inputs.value;
  p.is_causal = options.is_causal;
  check(!p.is_causal || p.length_q == p.length_k, "key: expected the length of query, ", p.length_q,
        ", where attention is causal, got ", p.length_k);
  read_feature_map(options, p);
  p.scale = read_scale(options.scale, p.dtype, p.head_dim);
  if (x.initial_state) p.initial_state = read_state("initial_state", *x.initial_state, x.query, p);
}

OutputAndState forward(const StateInputs& x, const LinearOptions& options, const ReturnState& wanted) {
  LinearStateForwardParams p;
  read(x, options, p);
  OutputAndState y{empty_rows(x.query, p.value_dim), empty_state(x.query, p, wanted.return_state ? p.features() : 0)};
  p.output = view_rows(y.output);
  p.state = wanted.return_state ? y.state.data_ptr() : nullptr;
  run(p, target_of(x));
  return y;
}

StateGradients backward(const GradOutputAndState& grads, const StateInputs& x, const LinearOptions& options) {
  LinearStateBackwardParams p;
  read(x, options, p);
  if (grads.grad_output) p.grad_output = read_output("grad_output", *grads.grad_output, {x.query, x.key, x.value});
  // A state that was not returned is empty, and so is its gradient.
  if (grads.grad_state && grads.grad_state->numel() > 0)
    p.grad_state = read_state("grad_state", *grads.grad_state, x.query, p);
  StateGradients y{empty_rows(x.query, p.head_dim), empty_rows(x.key, p.head_dim), empty_rows(x.value, p.value_dim),
                   empty_state(x.query, p, p.features())};
  p.grad_query = view_rows(y.grad_query);
  p.grad_key = view_rows(y.grad_key);
  p.grad_value = view_rows(y.grad_value);
  p.grad_initial_state = y.grad_initial_state.data_ptr();
  run(p, target_of(x));
  return y;
}

const Registration registration("linear_attention", OnHost::kRefused,
                                {define<forward>("linear_attention"), define<backward>("linear_attention_backward")});

}  // namespace

}  // namespace attnx::ops
