// This file registers torch.ops.attnx.sigmoid_attention and its packed and backward forms.
#include "results.h"
#include "terms.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "sigmoid_attention";

struct Additions {
  Bias bias;
  AlibiSlopes alibi_slopes;
  std::string bias_rule;
  double bias_value;
  ATTNX_FIELDS(bias, alibi_slopes, bias_rule, bias_value)
};

struct OutputGradient {
  StableTensor grad_output;
  ATTNX_FIELDS(grad_output)
};

template <class Layout>
void read(const Target& target, const Inputs& x, const Layout& layout, const Additions& additions,
          const typename PairTermsOf<Layout>::Terms& pairs, const Terms& terms, const Window& window,
          AttentionParams& p) {
  p.score = Score::kSigmoid;
  read_inputs(target, x, layout, p);
  read_window(window, p);
  read_head_parameters(target, additions, p);
  read_terms(target, pairs, p);
  read_terms(target, terms, p);
  read_bias(additions.bias_rule, additions.bias_value, p);
}

template <class Layout>
StableTensor forward(const Inputs& x, const Layout& layout, const Additions& additions,
                     const typename PairTermsOf<Layout>::Terms& pairs, const Terms& terms, const Window& window) {
  const Target target{kSystem, x.query};
  ForwardParams p;
  read(target, x, layout, additions, pairs, terms, window, p);
  const StableTensor output = empty_output(x, p);
  run(p, target);
  return output;
}

template <class Layout>
using AllGradients =
    std::tuple<InputGradients, HeadGradients<Additions>, typename PairTermsOf<Layout>::Gradients, TermGradients>;

template <class Layout>
AllGradients<Layout> backward(const OutputGradient& gradient, const Inputs& x, const Layout& layout,
                              const Additions& additions, const typename PairTermsOf<Layout>::Terms& pairs,
                              const Terms& terms, const Window& window,
                              const typename PairTermsOf<Layout>::Wanted& wanted_pairs, const WantedTerms& wanted,
                              const Deterministic& option) {
  const Target target{kSystem, x.query, option.deterministic};
  BackwardParams p;
  read(target, x, layout, additions, pairs, terms, window, p);
  p.grad_output = read_output("grad_output", gradient.grad_output, x);
  const auto of_terms =
      std::tuple(empty_gradients(target, wanted_pairs, pairs, p), empty_gradients(target, wanted, terms, p));
  return std::tuple_cat(run_backward(target, x, additions, p), of_terms);
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<forward<DenseWithLengths>>("sigmoid_attention"),
                                 define<forward<PackedWithPadding>>("sigmoid_attention_varlen"),
                                 define<backward<DenseWithLengths>>("sigmoid_attention_backward"),
                                 define<backward<PackedWithPadding>>("sigmoid_attention_varlen_backward")});

}  // namespace

}  // namespace attnx::ops
