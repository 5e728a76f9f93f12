// torch.ops.attnx.sigmoid_attention and its packed and backward forms.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "backend.h"

namespace attnx::ops {

namespace {

struct Bias {
  const std::optional<StableTensor>& tensor;
  const std::string& rule;
  double value;
};

StableTensor forward(const Arguments& args, const Bias& bias) {
  ForwardParams p;
  p.score = Score::kSigmoid;
  read_arguments(args, p);
  read_bias(bias.tensor, bias.rule, bias.value, args.query, p);
  StableTensor output = empty_rows(args.query, p.value_dim);
  p.output = view_rows(output);
  run(p, args.query);
  return output;
}

using Gradients = std::tuple<StableTensor, StableTensor, StableTensor, StableTensor, StableTensor>;

Gradients backward(const StableTensor& grad_output, const Arguments& args, const Bias& bias, bool deterministic) {
  BackwardParams p;
  p.score = Score::kSigmoid;
  read_arguments(args, p);
  read_bias(bias.tensor, bias.rule, bias.value, args.query, p);
  p.grad_output = read_output("grad_output", grad_output, args);
  StableTensor grad_query = empty_rows(args.query, p.head_dim);
  StableTensor grad_key = empty_rows(args.key, p.head_dim);
  StableTensor grad_value = empty_rows(args.value, p.value_dim);
  const auto bias_sums = empty_sums(bias.tensor, args.query, p);
  const auto slopes_sums = empty_sums(args.alibi_slopes, args.query, p);
  p.grad_query = view_rows(grad_query);
  p.grad_key = view_rows(grad_key);
  p.grad_value = view_rows(grad_value);
  p.grad_bias = view_sums(bias_sums);
  p.grad_alibi_slopes = view_sums(slopes_sums);
  run(p, args.query, deterministic);
  return {grad_query, grad_key, grad_value, sum_over_batch(bias_sums, args.query),
          sum_over_batch(slopes_sums, args.query)};
}

StableTensor sigmoid_attention(const StableTensor& query, const StableTensor& key, const StableTensor& value,
                               const std::optional<StableTensor>& bias, const std::optional<StableTensor>& alibi_slopes,
                               const std::string& bias_rule, double bias_value, std::optional<double> scale,
                               bool is_causal, std::int64_t window_left, std::int64_t window_right) {
  return forward({query, key, value, nullptr, alibi_slopes, scale, is_causal, window_left, window_right},
                 {bias, bias_rule, bias_value});
}

StableTensor sigmoid_attention_varlen(const StableTensor& query, const StableTensor& key, const StableTensor& value,
                                      const StableTensor& cu_seqlens_q, const StableTensor& cu_seqlens_k,
                                      std::int64_t max_seqlen_q, std::int64_t max_seqlen_k,
                                      const std::optional<StableTensor>& bias,
                                      const std::optional<StableTensor>& alibi_slopes, const std::string& bias_rule,
                                      double bias_value, std::optional<double> scale, bool is_causal,
                                      std::int64_t window_left, std::int64_t window_right) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return forward({query, key, value, &packing, alibi_slopes, scale, is_causal, window_left, window_right},
                 {bias, bias_rule, bias_value});
}

Gradients sigmoid_attention_backward(const StableTensor& grad_output, const StableTensor& query,
                                     const StableTensor& key, const StableTensor& value,
                                     const std::optional<StableTensor>& bias,
                                     const std::optional<StableTensor>& alibi_slopes, const std::string& bias_rule,
                                     double bias_value, std::optional<double> scale, bool is_causal,
                                     std::int64_t window_left, std::int64_t window_right, bool deterministic) {
  return backward(grad_output, {query, key, value, nullptr, alibi_slopes, scale, is_causal, window_left, window_right},
                  {bias, bias_rule, bias_value}, deterministic);
}

Gradients sigmoid_attention_varlen_backward(
    const StableTensor& grad_output, const StableTensor& query, const StableTensor& key, const StableTensor& value,
    const StableTensor& cu_seqlens_q, const StableTensor& cu_seqlens_k, std::int64_t max_seqlen_q,
    std::int64_t max_seqlen_k, const std::optional<StableTensor>& bias, const std::optional<StableTensor>& alibi_slopes,
    const std::string& bias_rule, double bias_value, std::optional<double> scale, bool is_causal,
    std::int64_t window_left, std::int64_t window_right, bool deterministic) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return backward(grad_output, {query, key, value, &packing, alibi_slopes, scale, is_causal, window_left, window_right},
                  {bias, bias_rule, bias_value}, deterministic);
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("sigmoid_attention", TORCH_BOX(&sigmoid_attention));
  m.impl("sigmoid_attention_varlen", TORCH_BOX(&sigmoid_attention_varlen));
  m.impl("sigmoid_attention_backward", TORCH_BOX(&sigmoid_attention_backward));
  m.impl("sigmoid_attention_varlen_backward", TORCH_BOX(&sigmoid_attention_varlen_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnx, m) {
  m.def(
      "sigmoid_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, str bias_rule, "
      "float bias_value, float? scale, bool is_causal, int window_left, int window_right) -> Tensor");
  m.def(
      "sigmoid_attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? bias, Tensor? alibi_slopes, str bias_rule, "
      "float bias_value, float? scale, bool is_causal, int window_left, int window_right) -> Tensor");
  m.def(
      "sigmoid_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? bias, "
      "Tensor? alibi_slopes, str bias_rule, float bias_value, float? scale, bool is_causal, int window_left, "
      "int window_right, bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_bias, Tensor grad_alibi_slopes)");
  m.def(
      "sigmoid_attention_varlen_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? bias, "
      "Tensor? alibi_slopes, str bias_rule, float bias_value, float? scale, bool is_causal, int window_left, "
      "int window_right, bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_bias, Tensor grad_alibi_slopes)");
}

STABLE_TORCH_LIBRARY_IMPL(attnx, CPU, m) { implement(m); }
#if ATTNX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(attnx, CUDA, m) { implement(m); }
#endif

}  // namespace attnx::ops
