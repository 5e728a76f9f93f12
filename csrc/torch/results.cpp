#include "results.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

namespace attnx::ops {

StableTensor empty_rows(const StableTensor& like, std::int64_t dim, std::optional<ScalarType> dtype) {
  if (like.dim() == 3) return make_empty(like, std::vector{like.size(0), like.size(1), dim}, dtype);
  if (like.stride(1) < like.stride(2)) {
    const std::vector shape{like.size(0), like.size(2), like.size(1), dim};
    return torch::stable::transpose(make_empty(like, shape, dtype), 1, 2);
  }
  return make_empty(like, std::vector{like.size(0), like.size(1), like.size(2), dim}, dtype);
}

StableTensor empty_logsumexp(const StableTensor& query) {
  const ScalarType dtype = sum_type(query);
  if (query.dim() == 3) return make_empty(query, std::vector{query.size(1), query.size(0)}, dtype);
  return make_empty(query, std::vector{query.size(0), query.size(1), query.size(2)}, dtype);
}

StableTensor empty_output(const Inputs& x, ForwardParams& p) {
  StableTensor output = empty_rows(x.query, p.value_dim);
  if (p.has_padding) torch::stable::zero_(output);
  p.output = view_rows(output);
  return output;
}

Outputs empty_outputs(const Inputs& x, ForwardParams& p) {
  Outputs y{empty_output(x, p), empty_logsumexp(x.query)};
  if (!is_normalised(p.score)) {
    torch::stable::zero_(y.logsumexp);
  } else {
    if (p.has_padding) torch::stable::fill_(y.logsumexp, -std::numeric_limits<double>::infinity());
    p.logsumexp = view_logsumexp(y.logsumexp);
  }
  return y;
}

Outputs run_forward(const Target& target, const Inputs& x, ForwardParams& p) {
  Outputs y = empty_outputs(x, p);
  run(p, target);
  return y;
}

InputGradients empty_gradients(const Inputs& x, BackwardParams& p) {
  InputGradients gradients{empty_rows(x.query, p.head_dim), empty_rows(x.key, p.head_dim),
                           empty_rows(x.value, p.value_dim)};
  // Kernels write the rows of sequences alone.
  const bool unused_keys = p.key_ends && !p.cu_seqlens_q;
  if (p.has_padding) torch::stable::zero_(gradients.grad_query);
  if (p.has_padding || unused_keys) torch::stable::zero_(gradients.grad_key);
  if (p.has_padding || unused_keys) torch::stable::zero_(gradients.grad_value);
  p.grad_query = view_rows(gradients.grad_query);
  p.grad_key = view_rows(gradients.grad_key);
  p.grad_value = view_rows(gradients.grad_value);
  return gradients;
}

Tensor read_output(const char* name, const StableTensor& x, const Inputs& inputs) {
  const StableTensor& q = inputs.query;
  const std::int64_t dim = inputs.value.size(inputs.value.dim() - 1);
  check_dtype(name, x, q.scalar_type(), " like query");
  if (q.dim() == 3) {
    check_shape(name, x, {q.size(0), q.size(1), dim});
  } else {
    check_shape(name, x, {q.size(0), q.size(1), q.size(2), dim});
  }
  check_layout(name, x);
  return view_rows(x);
}

Tensor read_logsumexp(const char* name, const StableTensor& x, const Inputs& inputs) {
  const StableTensor& q = inputs.query;
  check_dtype(name, x, sum_type(q), "");
  if (q.dim() == 3) {
    check_shape(name, x, {q.size(1), q.size(0)});
  } else {
    check_shape(name, x, {q.size(0), q.size(1), q.size(2)});
  }
  return view_logsumexp(x);
}

void read_outputs(const OutputGradients& gradients, const Outputs& y, const Inputs& x, BackwardParams& p) {
  p.grad_output = read_output("grad_output", gradients.grad_output, x);
  p.grad_logsumexp = read_logsumexp("grad_logsumexp", gradients.grad_logsumexp, x);
  p.output = read_output("output", y.output, x);
  p.logsumexp = read_logsumexp("logsumexp", y.logsumexp, x);
}

std::optional<StableTensor> empty_sums(const std::optional<StableTensor>& parameter, const StableTensor& query,
                                       const AttentionParams& p) {
  if (!parameter) return std::nullopt;
  return make_empty(query, std::vector{p.batch, p.heads_q}, ScalarType::Double);
}

StableTensor sum_over_batch(const std::optional<StableTensor>& sums, const Target& target) {
  const StableTensor& query = target.tensor;
  const std::vector shape{query.size(1)};
  if (!sums) return make_zeros(query, shape, sum_type(query));
  StableTensor result = make_empty(query, shape, sum_type(query));
  run(SumOverBatchParams{.dtype = to_dtype(sum_type(query)),
                         .batch = sums->size(0),
                         .heads = sums->size(1),
                         .from = data<double>(*sums),
                         .to = result.data_ptr()},
      target);
  return result;
}

}  // namespace attnx::ops
