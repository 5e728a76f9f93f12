// This file registers torch.ops.attnx.softplus_attention and sharpened_softplus_attention, and their packed and
// backward forms. Queries and keys come normalised and scaled; the sharpened form raises what weighs more than the mean
// of its row to a power.
#include <torch/csrc/stable/ops.h>

#include "results.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "softplus_attention";
constexpr const char* kSharpened = "sharpened_softplus_attention";

struct Power {
  std::int64_t power;
  ATTNX_FIELDS(power)
};
// These are numbers of the rows, like a logsumexp.
struct RowNumbers {
  StableTensor gain, shift;
  ATTNX_FIELDS(gain, shift)
};
struct OutputGradient {
  StableTensor grad_output;
  ATTNX_FIELDS(grad_output)
};

template <class Layout>
void read(const Target& target, const Inputs& x, const Layout& layout, const Window& window, AttentionParams& p) {
  read_inputs(target, x, layout, p);
  read_window(window, p);
}

template <class Layout>
Outputs forward(const Inputs& x, const Layout& layout, const Window& window) {
  const Target target{kSystem, x.query};
  ForwardParams p;
  p.score = Score::kSoftplus;
  read(target, x, layout, window, p);
  return run_forward(target, x, p);
}

template <class Layout>
InputGradients backward(const OutputGradients& gradients, const Inputs& x, const Outputs& y, const Layout& layout,
                        const Window& window, const Deterministic& option) {
  const Target target{kSystem, x.query, option.deterministic};
  BackwardParams p;
  p.score = Score::kSoftplus;
  read(target, x, layout, window, p);
  read_outputs(gradients, y, x, p);
  const InputGradients result = empty_gradients(x, p);
  run(p, target);
  return result;
}

template <class Layout>
void read_sharpened(const Target& target, const Inputs& x, const Layout& layout, const Window& window,
                    const Power& power, AttentionParams& p) {
  p.score = Score::kSharpenedSoftplus;
  read(target, x, layout, window, p);
  check(power.power >= 1 && power.power <= 64, "power: expected a whole number from 1 to 64, got ", power.power);
  p.sharpening.power = power.power;
}

template <class Layout>
std::tuple<Outputs, RowNumbers> sharpened_forward(const Inputs& x, const Layout& layout, const Window& window,
                                                  const Power& power) {
  const Target target{kSharpened, x.query};
  ForwardParams p;
  read_sharpened(target, x, layout, window, power, p);
  RowNumbers rows{empty_logsumexp(x.query), empty_logsumexp(x.query)};
  for (StableTensor* number : {&rows.gain, &rows.shift})
    if (p.has_padding) torch::stable::zero_(*number);
  p.sharpening.gain = view_logsumexp(rows.gain);
  p.sharpening.shift = view_logsumexp(rows.shift);
  run(SoftplusRowsParams{{p}}, target);
  return {run_forward(target, x, p), rows};
}

template <class Layout>
InputGradients sharpened_backward(const OutputGradient& gradient, const Inputs& x, const Outputs& y,
                                  const RowNumbers& rows, const Layout& layout, const Window& window,
                                  const Power& power, const Deterministic& option) {
  const Target target{kSharpened, x.query, option.deterministic};
  BackwardParams p;
  read_sharpened(target, x, layout, window, power, p);
  StableTensor none = empty_logsumexp(x.query);
  torch::stable::zero_(none);
  read_outputs({gradient.grad_output, none}, y, x, p);
  p.sharpening.gain = read_logsumexp("gain", rows.gain, x);
  p.sharpening.shift = read_logsumexp("shift", rows.shift, x);
  const InputGradients result = empty_gradients(x, p);
  run(p, target);
  return result;
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<forward<DenseWithLengths>>("softplus_attention"),
                                 define<forward<PackedWithPadding>>("softplus_attention_varlen"),
                                 define<backward<DenseWithLengths>>("softplus_attention_backward"),
                                 define<backward<PackedWithPadding>>("softplus_attention_varlen_backward")});
const Registration registration_of_sharpened(
    kSharpened, OnHost::kRefused,
    {define<sharpened_forward<DenseWithLengths>>("sharpened_softplus_attention"),
     define<sharpened_forward<PackedWithPadding>>("sharpened_softplus_attention_varlen"),
     define<sharpened_backward<DenseWithLengths>>("sharpened_softplus_attention_backward"),
     define<sharpened_backward<PackedWithPadding>>("sharpened_softplus_attention_varlen_backward")});

}  // namespace

}  // namespace attnx::ops
