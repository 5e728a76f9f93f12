// This file registers torch.ops.attnx.softmax_attention_jvp and sigmoid_attention_jvp: attention, and its derivative
// along a direction.
#include "attnx/jvp_params.h"
#include "results.h"

namespace attnx::ops {

namespace {

// A tangent that is None is zero, and its products are left out.
struct Tangents {
  std::optional<StableTensor> tangent_query, tangent_key, tangent_value;
  ATTNX_FIELDS(tangent_query, tangent_key, tangent_value)
};
struct Bias {
  std::string bias_rule;
  double bias_value;
  ATTNX_FIELDS(bias_rule, bias_value)
};
struct SoftmaxResults {
  StableTensor output, logsumexp, tangent_output, tangent_logsumexp;
  ATTNX_FIELDS(output, logsumexp, tangent_output, tangent_logsumexp)
};
struct SigmoidResults {
  StableTensor output, tangent_output;
  ATTNX_FIELDS(output, tangent_output)
};

Tensor read_tangent(const char* name, const std::optional<StableTensor>& x, const char* of_name,
                    const StableTensor& of) {
  if (!x) return {};
  check_dtype(name, *x, of.scalar_type(), " like query");
  check(x->dim() == 4 && x->size(0) == of.size(0) && x->size(1) == of.size(1) && x->size(2) == of.size(2) &&
            x->size(3) == of.size(3),
        name, ": expected the shape of ", of_name, ", ", shape_of(of), ", got ", shape_of(*x));
  check_layout(name, *x);
  return view_rows(*x);
}

void read(const Target& target, const Inputs& x, const Tangents& tangents, const Window& window, JvpParams& p) {
  read_inputs(target, x, Dense(), p);
  read_window(window, p);
  p.tangent_query = read_tangent("tangent_query", tangents.tangent_query, "query", x.query);
  p.tangent_key = read_tangent("tangent_key", tangents.tangent_key, "key", x.key);
  p.tangent_value = read_tangent("tangent_value", tangents.tangent_value, "value", x.value);
}

StableTensor empty_tangent(const Inputs& x, JvpParams& p) {
  StableTensor tangent = empty_rows(x.query, p.value_dim);
  p.tangent_output = view_rows(tangent);
  return tangent;
}

SoftmaxResults softmax(const Inputs& x, const Tangents& tangents, const Window& window) {
  const Target target{"softmax_attention_jvp", x.query};
  JvpParams p;
  p.score = Score::kSoftmax;
  read(target, x, tangents, window, p);
  SoftmaxResults y{empty_output(x, p), empty_logsumexp(x.query), empty_tangent(x, p), empty_logsumexp(x.query)};
  p.logsumexp = view_logsumexp(y.logsumexp);
  p.tangent_logsumexp = view_logsumexp(y.tangent_logsumexp);
  run(p, target);
  return y;
}

SigmoidResults sigmoid(const Inputs& x, const Tangents& tangents, const Bias& bias, const Window& window) {
  const Target target{"sigmoid_attention_jvp", x.query};
  JvpParams p;
  p.score = Score::kSigmoid;
  read(target, x, tangents, window, p);
  read_bias(bias.bias_rule, bias.bias_value, p);
  SigmoidResults y{empty_output(x, p), empty_tangent(x, p)};
  run(p, target);
  return y;
}

const Registration registration_of_softmax("softmax_attention_jvp", OnHost::kRefused,
                                           {define<softmax>("softmax_attention_jvp")});
const Registration registration_of_sigmoid("sigmoid_attention_jvp", OnHost::kRefused,
                                           {define<sigmoid>("sigmoid_attention_jvp")});

}  // namespace

}  // namespace attnx::ops
