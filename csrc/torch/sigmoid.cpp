// This file registers torch.ops.attnx.sigmoid_attention and its packed and backward forms.
#include "results.h"

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
void read(const Target& target, const Inputs& x, const Layout& layout, const Additions& additions, const Window& window,
          AttentionParams& p) {
  p.score = Score::kSigmoid;
  read_inputs(target, x, layout, p);
  read_window(window, p);
  read_head_parameters(target, additions, p);
  read_bias(additions.bias_rule, additions.bias_value, p);
}

template <class Layout>
StableTensor forward(const Inputs& x, const Layout& layout, const Additions& additions, const Window& window) {
  const Target target{kSystem, x.query};
  ForwardParams p;
  read(target, x, layout, additions, window, p);
  const StableTensor output = empty_output(x, p);
  run(p, target);
  return output;
}

template <class Layout>
Gradients<Additions> backward(const OutputGradient& gradient, const Inputs& x, const Layout& layout,
                              const Additions& additions, const Window& window, const Deterministic& option) {
  const Target target{kSystem, x.query, option.deterministic};
  BackwardParams p;
  read(target, x, layout, additions, window, p);
  p.grad_output = read_output("grad_output", gradient.grad_output, x);
  return run_backward(target, x, additions, p);
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<forward<DenseWithLengths>>("sigmoid_attention"),
                                 define<forward<PackedWithPadding>>("sigmoid_attention_varlen"),
                                 define<backward<DenseWithLengths>>("sigmoid_attention_backward"),
                                 define<backward<PackedWithPadding>>("sigmoid_attention_varlen_backward")});

}  // namespace

}  // namespace attnx::ops
