// This file registers torch.ops.attnx.softmax_attention and its packed and backward forms.
#include "results.h"
#include "terms.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "softmax_attention";

struct Additions {
  AlibiSlopes alibi_slopes;
  Sink sink;
  ATTNX_FIELDS(alibi_slopes, sink)
};

template <class Layout>
void read(const Target& target, const Inputs& x, const Layout& layout, const Additions& additions,
          const typename PairTermsOf<Layout>::Terms& pairs, const Terms& terms, const Window& window,
          AttentionParams& p) {
  p.score = Score::kSoftmax;
  read_sink(additions.sink, p);
  read_inputs(target, x, layout, p);
  read_window(window, p);
  read_head_parameters(target, additions, p);
  read_terms(target, pairs, p);
  read_terms(target, terms, p);
}

template <class Layout>
Outputs forward(const Inputs& x, const Layout& layout, const Additions& additions,
                const typename PairTermsOf<Layout>::Terms& pairs, const Terms& terms, const Window& window) {
  const Target target{kSystem, x.query};
  ForwardParams p;
  read(target, x, layout, additions, pairs, terms, window, p);
  return run_forward(target, x, p);
}

template <class Layout>
using AllGradients =
    std::tuple<InputGradients, HeadGradients<Additions>, typename PairTermsOf<Layout>::Gradients, TermGradients>;

template <class Layout>
AllGradients<Layout> backward(const OutputGradients& gradients, const Inputs& x, const Outputs& y, const Layout& layout,
                              const Additions& additions, const typename PairTermsOf<Layout>::Terms& pairs,
                              const Terms& terms, const Window& window,
                              const typename PairTermsOf<Layout>::Wanted& wanted_pairs, const WantedTerms& wanted,
                              const Deterministic& option) {
  const Target target{kSystem, x.query, option.deterministic};
  BackwardParams p;
  read(target, x, layout, additions, pairs, terms, window, p);
  read_outputs(gradients, y, x, p);
  const auto of_terms =
      std::tuple(empty_gradients(target, wanted_pairs, pairs, p), empty_gradients(target, wanted, terms, p));
  return std::tuple_cat(run_backward(target, x, additions, p), of_terms);
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<forward<DenseWithLengths>>("softmax_attention"),
                                 define<forward<PackedWithPadding>>("softmax_attention_varlen"),
                                 define<backward<DenseWithLengths>>("softmax_attention_backward"),
                                 define<backward<PackedWithPadding>>("softmax_attention_varlen_backward")});

}  // namespace

}  // namespace attnx::ops
