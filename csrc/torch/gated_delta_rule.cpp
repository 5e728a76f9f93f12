// This file registers torch.ops.attnx.gated_delta_rule and its backward.
#include <cmath>

#include "attnx/capability.h"
#include "results.h"

namespace attnx::ops {

namespace {

struct DeltaInputs {
  StableTensor query, key, value, log_decay, beta;
  std::optional<StableTensor> initial_state, carry;
  ATTNX_FIELDS(query, key, value, log_decay, beta, initial_state, carry)
};
struct DeltaOptions {
  std::optional<double> scale;
  bool normalize_qk;
  ATTNX_FIELDS(scale, normalize_qk)
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
struct DeltaGradients {
  StableTensor grad_query, grad_key, grad_value, grad_log_decay, grad_beta, grad_initial_state, grad_carry;
  ATTNX_FIELDS(grad_query, grad_key, grad_value, grad_log_decay, grad_beta, grad_initial_state, grad_carry)
};

Target target_of(const DeltaInputs& x) { return {"gated_delta_rule", x.query}; }

double number_at(const StableTensor& x, std::int64_t place) {
  return x.scalar_type() == ScalarType::Double ? data<const double>(x)[place] : data<const float>(x)[place];
}

PerToken read_gate(const char* name, const StableTensor& x, const StableTensor& query, const DeltaRuleParams& p,
                   std::int64_t numbers) {
  check_dtype(name, x, sum_type(query), " (the type of the sums)");
  check_shape(name, x, {p.batch, p.heads_v, numbers});
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// A state that grew would overflow within a long sequence.
void check_decays(const StableTensor& x) {
  const auto values = values_on_host(x);
  if (!values) return;
  for (std::int64_t b = 0; b < values->size(0); ++b)
    for (std::int64_t h = 0; h < values->size(1); ++h)
      for (std::int64_t i = 0; i < values->size(2); ++i) {
        const double number = number_at(*values, b * values->stride(0) + h * values->stride(1) + i * values->stride(2));
        check(number <= 0, "log_decay: expected numbers of 0 or below, the logarithms of decays, got ", number, " at (",
              b, ", ", h, ", ", i, ")");
      }
}

Tensor read_state(const char* name, const StableTensor& x, const StableTensor& query, const DeltaRuleParams& p) {
  check_dtype(name, x, sum_type(query), " (the type of the sums)");
  check_shape(name, x, {p.batch, p.heads_v, p.key_dim, p.value_dim});
  check_layout(name, x);
  return view_rows(x);
}

void read(const DeltaInputs& x, const DeltaOptions& options, DeltaRuleParams& p) {
  const Capability& row = target_of(x).capability();
  check(lists(row.dtypes, dtype_of(x.query)), "query: expected one of ", row.dtypes, " (", row.op, " on ", row.backend,
        "), got ", dtype_of(x.query));
  p.dtype = to_dtype(x.query.scalar_type());
  for (const auto& [name, tensor] : {std::pair("query", &x.query), {"key", &x.key}, {"value", &x.value}}) {
    check(tensor->dim() == 4, name, ": expected 4 dimensions, (batch, heads, length, head_dim), got shape ",
          shape_of(*tensor));
    check_dtype(name, *tensor, x.query.scalar_type(), " like query");
    check_layout(name, *tensor);
  }
  p.batch = x.query.size(0);
  p.heads_k = x.query.size(1);
  p.length = x.query.size(2);
  p.key_dim = x.query.size(3);
  p.heads_v = x.value.size(1);
  p.value_dim = x.value.size(3);
  check(p.heads_k >= 1 && p.heads_v >= 1 && p.heads_v % p.heads_k == 0,
        "value: expected heads to be a multiple of the ", p.heads_k, " heads of query, got ", p.heads_v);
  for (const auto& [name, dim] :
       {std::pair("query: expected head_dim", p.key_dim), {"value: expected value_dim", p.value_dim}})
    check(dim >= row.head_dim_min && dim <= row.head_dim_max, name, " from ", row.head_dim_min, " to ",
          row.head_dim_max, " (", row.op, " on ", row.backend, "), got ", dim);
  check_shape("key", x.key, {p.batch, p.heads_k, p.length, p.key_dim});
  check_shape("value", x.value, {p.batch, p.heads_v, p.length, p.value_dim});
  p.query = view_rows(x.query);
  p.key = view_rows(x.key);
  p.value = view_rows(x.value);
  p.log_decay = read_gate("log_decay", x.log_decay, x.query, p, p.length);
  p.beta = read_gate("beta", x.beta, x.query, p, p.length);
  check_decays(x.log_decay);
  if (x.initial_state) p.initial_state = read_state("initial_state", *x.initial_state, x.query, p);
  check(!x.carry || lists(row.features, "carry"), "carry: expected none, as ", row.op, " has no carry on ", row.backend,
        ", got one");
  check(!options.normalize_qk || !target_of(x).on_cuda(), "normalize_qk: expected False, as ", row.op,
        " has no kernel that normalises on cuda, got True");
  if (x.carry) p.carry = read_gate("carry", *x.carry, x.query, p, p.chunks());
  p.scale = read_scale(options.scale, p.dtype, p.key_dim);
  p.normalize = options.normalize_qk;
}

OutputAndState forward(const DeltaInputs& x, const DeltaOptions& options) {
  DeltaRuleForwardParams p;
  read(x, options, p);
  OutputAndState y{empty_rows(x.value, p.value_dim),
                   make_empty(x.query, std::vector{p.batch, p.heads_v, p.key_dim, p.value_dim}, sum_type(x.query))};
  p.output = view_rows(y.output);
  p.state = y.state.data_ptr();
  run(p, target_of(x));
  return y;
}

DeltaGradients backward(const GradOutputAndState& grads, const DeltaInputs& x, const DeltaOptions& options) {
  DeltaRuleBackwardParams p;
  read(x, options, p);
  if (grads.grad_output) {
    check_dtype("grad_output", *grads.grad_output, x.query.scalar_type(), " like query");
    check_shape("grad_output", *grads.grad_output, {p.batch, p.heads_v, p.length, p.value_dim});
    check_layout("grad_output", *grads.grad_output);
    p.grad_output = view_rows(*grads.grad_output);
  }
  if (grads.grad_state) p.grad_state = read_state("grad_state", *grads.grad_state, x.query, p);
  const ScalarType sums = sum_type(x.query);
  const std::vector of_gates{p.batch, p.heads_v, p.length};
  DeltaGradients y{empty_rows(x.query, p.key_dim),
                   empty_rows(x.key, p.key_dim),
                   empty_rows(x.value, p.value_dim),
                   make_empty(x.query, of_gates, sums),
                   make_empty(x.query, of_gates, sums),
                   make_empty(x.query, std::vector{p.batch, p.heads_v, p.key_dim, p.value_dim}, sums),
                   make_empty(x.query, std::vector{p.batch, p.heads_v, x.carry ? p.chunks() : 0}, sums)};
  p.grad_query = view_rows(y.grad_query);
  p.grad_key = view_rows(y.grad_key);
  p.grad_value = view_rows(y.grad_value);
  p.grad_log_decay = y.grad_log_decay.data_ptr();
  p.grad_beta = y.grad_beta.data_ptr();
  p.grad_initial_state = y.grad_initial_state.data_ptr();
  if (x.carry) p.grad_carry = y.grad_carry.data_ptr();
  run(p, target_of(x));
  return y;
}

const Registration registration("gated_delta_rule", OnHost::kRefused,
                                {define<forward>("gated_delta_rule"), define<backward>("gated_delta_rule_backward")});

}  // namespace

}  // namespace attnx::ops
