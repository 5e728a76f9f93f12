// The weight is P = sigmoid(logit). Every weight stands alone, so the forward keeps nothing of a row and the backward
// needs nothing of the forward. Ramapuram et al. describe it in arXiv 2409.04431.
#pragma once

#include "../math.h"
#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

// It returns e^x with x bounded so that 1 + e^x and its reciprocal stay normal. A weight is e^x / (1 + e^x), which
// reaches 0 where e^x does.
template <class V>
ATTNX_INLINE V bounded_exp(V x) {
  if constexpr (sizeof(x[0]) == 4)
    return exp(at_most(x, 86.0f));
  else
    return exp(x > 700.0 ? V{} + 700.0 : x);
}

// It returns the weight, and sets `complement` to 1 less the weight times the divisor, over the divisor.
template <class V>
ATTNX_INLINE V weight_and_complement(V x, decltype(V()[0] + 0) divisor, V& complement) {
  const V e = bounded_exp(x);
  complement = reciprocal(e * divisor + divisor);
  return e * complement;
}

template <class A>
class SigmoidForward {
  using Sum = typename A::Sum;

 public:
  template <class Sequence>
  void begin(const AttentionParams&, const Sequence&, const Panel<Sum>&, bool /*first_keys*/) {}

  // It turns the products s[keys][lanes] into weights, a B operand over keys.
  template <class OnTile>
  void weigh(Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const OnTile& on_tile,
             typename A::Element* weights, Sum* /*output*/, std::int64_t /*value_dim*/) {
    for (int v = 0; v < panel.vectors; ++v) {
      const int lane = v * kLanes<Sum>;
      for_each_logit<A>(s, keys, scale, panel, on_tile, v, [&](auto key, auto& x, auto& visible, auto masked) {
        Vec<Sum> p[A::kStep];
        for (int k = 0; k < A::kStep; ++k) {
          Vec<Sum> complement;
          p[k] = weight_and_complement(x[k], on_tile.divisor, complement);
          Vec<Sum> derivative = p[k] * complement * on_tile.divisor;
          if constexpr (masked.kValue) {
            p[k] = visible[k] ? p[k] : Vec<Sum>{};
            derivative = visible[k] ? derivative : Vec<Sum>{};
          }
          const std::int64_t at = (key + k) * kPanelLanes<Sum> + lane;
          on_tile.take_derivative(at, lane, derivative);
          p[k] = on_tile.kept(at, p[k]);
        }
        A::store_step(weights + step_index<A>(key, lane, kPanelLanes<Sum>), p);
      });
    }
  }

  // It does the same for one row, s[keys]: the weights are an A operand.
  void weigh_row(Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const PanelOnTile<Sum>& on_tile,
                 int row, typename A::Element* weights, Sum* /*output*/, std::int64_t /*value_dim*/) {
    for_each_logit_of_row<A>(s, keys, scale, panel, on_tile, row, [&](auto key, auto x, auto visible, auto masked) {
      Vec<Sum> complement, p = weight_and_complement(x, on_tile.divisor, complement);
      if constexpr (masked.kValue) p = visible ? p : Vec<Sum>{};
      A::store_row(weights + key, p);
    });
  }

  Sum output_factor(const Panel<Sum>&, int) const { return 1; }
};

template <class A>
class SigmoidBackward {
  using Sum = typename A::Sum;

 public:
  template <class Input, class Sequence>
  void begin(const BackwardParams&, const Sequence&, const Panel<Sum>&) {}

  // It computes the weight of a logit, and its derivative times dP: p (1 - p) dP with 1 - p = 1 / (1 + e^x), which is
  // exact to rounding where p - p^2 would cancel. Where a list divides the weights, p times the divisor takes the place
  // of p in 1 - p.
  ATTNX_INLINE void differentiate(Vec<Sum> x, Vec<Sum> dp, int /*lane*/, const PanelOnTile<Sum>& on_tile, Vec<Sum>& p,
                                  Vec<Sum>& ds) const {
    Vec<Sum> complement;
    p = weight_and_complement(x, on_tile.divisor, complement);
    ds = p * complement * (on_tile.divisor * dp);
  }

  // It returns a logit whose weight is finite, and the derivative by a factor of the weight.
  ATTNX_INLINE Vec<Sum> bounded(Vec<Sum> x, int /*lane*/) const { return x; }
  ATTNX_INLINE Vec<Sum> by_factor(Vec<Sum> p, Vec<Sum> dp, Vec<Sum> /*ds*/) const {
    return p > 0 ? p * dp : Vec<Sum>{};
  }
};

struct Sigmoid {
  static constexpr bool kNormalised = false, kSkipsTiles = false, kHasSink = false, kSumsProducts = false;
  template <class A>
  using Forward = SigmoidForward<A>;
  template <class A>
  using Backward = SigmoidBackward<A>;
};

}  // namespace attnx::cpu::ATTNX_ISA
