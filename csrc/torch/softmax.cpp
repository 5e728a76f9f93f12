// torch.ops.attnx.softmax_attention and its packed and backward forms.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "backend.h"

namespace attnx::ops {

namespace {

using Outputs = std::tuple<StableTensor, StableTensor>;

Outputs forward(const Arguments& args) {
  ForwardParams p;
  p.score = Score::kSoftmax;
  read_arguments(args, p);
  StableTensor output = empty_rows(args.query, p.value_dim), logsumexp = empty_logsumexp(args.query);
  p.output = view_rows(output);
  p.logsumexp = view_logsumexp(logsumexp);
  run(p, args.query);
  return {output, logsumexp};
}

using Gradients = std::tuple<StableTensor, StableTensor, StableTensor, StableTensor>;

// What the backward has besides the forward's arguments.
struct Saved {
  const StableTensor &grad_output, &grad_logsumexp, &output, &logsumexp;
};

Gradients backward(const Saved& saved, const Arguments& args, bool deterministic) {
  BackwardParams p;
  p.score = Score::kSoftmax;
  read_arguments(args, p);
  p.grad_output = read_output("grad_output", saved.grad_output, args);
  p.grad_logsumexp = read_logsumexp("grad_logsumexp", saved.grad_logsumexp, args);
  p.output = read_output("output", saved.output, args);
  p.logsumexp = read_logsumexp("logsumexp", saved.logsumexp, args);
  StableTensor grad_query = empty_rows(args.query, p.head_dim);
  StableTensor grad_key = empty_rows(args.key, p.head_dim);
  StableTensor grad_value = empty_rows(args.value, p.value_dim);
  const auto slopes_sums = empty_sums(args.alibi_slopes, args.query, p);
  p.grad_query = view_rows(grad_query);
  p.grad_key = view_rows(grad_key);
  p.grad_value = view_rows(grad_value);
  p.grad_alibi_slopes = view_sums(slopes_sums);
  run(p, args.query, deterministic);
  return {grad_query, grad_key, grad_value, sum_over_batch(slopes_sums, args.query)};
}

Outputs softmax_attention(const StableTensor& query, const StableTensor& key, const StableTensor& value,
                          const std::optional<StableTensor>& alibi_slopes, std::optional<double> scale, bool is_causal,
                          std::int64_t window_left, std::int64_t window_right) {
  return forward({query, key, value, nullptr, alibi_slopes, scale, is_causal, window_left, window_right});
}

Outputs softmax_attention_varlen(const StableTensor& query, const StableTensor& key, const StableTensor& value,
                                 const StableTensor& cu_seqlens_q, const StableTensor& cu_seqlens_k,
                                 std::int64_t max_seqlen_q, std::int64_t max_seqlen_k,
                                 const std::optional<StableTensor>& alibi_slopes, std::optional<double> scale,
                                 bool is_causal, std::int64_t window_left, std::int64_t window_right) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return forward({query, key, value, &packing, alibi_slopes, scale, is_causal, window_left, window_right});
}

Gradients softmax_attention_backward(const StableTensor& grad_output, const StableTensor& grad_logsumexp,
                                     const StableTensor& query, const StableTensor& key, const StableTensor& value,
                                     const StableTensor& output, const StableTensor& logsumexp,
                                     const std::optional<StableTensor>& alibi_slopes, std::optional<double> scale,
                                     bool is_causal, std::int64_t window_left, std::int64_t window_right,
                                     bool deterministic) {
  return backward({grad_output, grad_logsumexp, output, logsumexp},
                  {query, key, value, nullptr, alibi_slopes, scale, is_causal, window_left, window_right},
                  deterministic);
}

Gradients softmax_attention_varlen_backward(const StableTensor& grad_output, const StableTensor& grad_logsumexp,
                                            const StableTensor& query, const StableTensor& key,
                                            const StableTensor& value, const StableTensor& output,
                                            const StableTensor& logsumexp, const StableTensor& cu_seqlens_q,
                                            const StableTensor& cu_seqlens_k, std::int64_t max_seqlen_q,
                                            std::int64_t max_seqlen_k, const std::optional<StableTensor>& alibi_slopes,
                                            std::optional<double> scale, bool is_causal, std::int64_t window_left,
                                            std::int64_t window_right, bool deterministic) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return backward({grad_output, grad_logsumexp, output, logsumexp},
                  {query, key, value, &packing, alibi_slopes, scale, is_causal, window_left, window_right},
                  deterministic);
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("softmax_attention", TORCH_BOX(&softmax_attention));
  m.impl("softmax_attention_varlen", TORCH_BOX(&softmax_attention_varlen));
  m.impl("softmax_attention_backward", TORCH_BOX(&softmax_attention_backward));
  m.impl("softmax_attention_varlen_backward", TORCH_BOX(&softmax_attention_varlen_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnx, m) {
  m.def(
      "softmax_attention(Tensor query, Tensor key, Tensor value, Tensor? alibi_slopes, float? scale, bool is_causal, "
      "int window_left, int window_right) -> (Tensor output, Tensor logsumexp)");
  m.def(
      "softmax_attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? alibi_slopes, float? scale, bool is_causal, "
      "int window_left, int window_right) -> (Tensor output, Tensor logsumexp)");
  m.def(
      "softmax_attention_backward(Tensor grad_output, Tensor grad_logsumexp, Tensor query, Tensor key, Tensor value, "
      "Tensor output, Tensor logsumexp, Tensor? alibi_slopes, float? scale, bool is_causal, int window_left, "
      "int window_right, bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_alibi_slopes)");
  m.def(
      "softmax_attention_varlen_backward(Tensor grad_output, Tensor grad_logsumexp, Tensor query, Tensor key, "
      "Tensor value, Tensor output, Tensor logsumexp, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, Tensor? alibi_slopes, float? scale, bool is_causal, int window_left, int window_right, "
      "bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_alibi_slopes)");
}

STABLE_TORCH_LIBRARY_IMPL(attnx, CPU, m) { implement(m); }
#if ATTNX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(attnx, CUDA, m) { implement(m); }
#endif

}  // namespace attnx::ops
