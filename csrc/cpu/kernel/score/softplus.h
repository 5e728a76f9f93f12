// The weight is P = softplus(logit) / Z, with the sum Z of the row: length-scaled softplus attention, arXiv 2501.13428.
// Logits of normalised rows are small, so that there is no maximum to run along, and ln Z stands for the logsumexp.
#pragma once

#include "../math.h"
#include "normalised.h"

namespace attnx::cpu::ATTNX_ISA {

// It returns ln(1 + e^x), and sets e to e^-|x|. Weights that are rounded to 16 bits need less of it.
template <class A>
ATTNX_INLINE Vec<typename A::Sum> softplus_of(Vec<typename A::Sum> x, Vec<typename A::Sum>& e) {
  return softplus<(sizeof(typename A::Element) < sizeof(typename A::Sum))>(x, e);
}
template <class A>
ATTNX_INLINE Vec<typename A::Sum> softplus_of(Vec<typename A::Sum> x) {
  Vec<typename A::Sum> e;
  return softplus_of<A>(x, e);
}
// It returns the derivative, from e^-|x|.
template <class V>
ATTNX_INLINE V softplus_slope(V x, V e) {
  return (x < 0 ? e : 1 + V{}) * reciprocal(1 + e);
}

template <class A>
class SoftplusForward {
  using Sum = typename A::Sum;

 public:
  template <class Sequence>
  void begin(const AttentionParams&, const Sequence&, const Panel<Sum>&, bool /*first_keys*/) {
    for (Sum& x : sum_) x = 0;
  }

  // It does what the sigmoid's weigh does, and sums the weights.
  template <class OnTile>
  void weigh(Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const OnTile& on_tile,
             typename A::Element* weights, Sum* /*output*/, std::int64_t /*value_dim*/) {
    for (int v = 0; v < panel.vectors; ++v) {
      const int lane = v * kLanes<Sum>;
      Vec<Sum> sum = {};
      for_each_logit<A>(s, keys, scale, panel, on_tile, v, [&](auto key, auto& x, auto& visible, auto masked) {
        Vec<Sum> p[A::kStep];
        for (int k = 0; k < A::kStep; ++k) {
          p[k] = softplus_of<A>(x[k]);
          if constexpr (masked.kValue) p[k] = visible[k] ? p[k] : Vec<Sum>{};
          sum += p[k];
        }
        A::store_step(weights + step_index<A>(key, lane, kPanelLanes<Sum>), p);
      });
      store(sum_ + lane, load(sum_ + lane) + sum);
    }
  }

  // It does the same for one row, s[keys]: the weights are an A operand.
  void weigh_row(Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const PanelOnTile<Sum>& on_tile,
                 int row, typename A::Element* weights, Sum* /*output*/, std::int64_t /*value_dim*/) {
    Vec<Sum> sum = {};
    for_each_logit_of_row<A>(s, keys, scale, panel, on_tile, row, [&](auto key, auto x, auto visible, auto masked) {
      Vec<Sum> p = softplus_of<A>(x);
      if constexpr (masked.kValue) p = visible ? p : Vec<Sum>{};
      sum += p;
      A::store_row(weights + key, p);
    });
    sum_[row] += sum_of_lanes<Sum>(sum);
  }

  Sum output_factor(const Panel<Sum>&, int lane) const { return sum_[lane] == 0 ? 0 : 1 / sum_[lane]; }
  Sum logsumexp(const Panel<Sum>&, int lane) const { return Sum(__builtin_log(sum_[lane])); }

 private:
  alignas(kVectorBytes) Sum sum_[kPanelLanes<Sum>];
};

template <class A>
class SoftplusBackward : public NormalisedBackward<A> {
  using Sum = typename A::Sum;
  using Base = NormalisedBackward<A>;

 public:
  template <class Input, class Sequence>
  void begin(const BackwardParams& p, const Sequence& s, const Panel<Sum>& panel) {
    Base::template begin<Input>(p, s, panel);
    for (int lane = 0; lane < kPanelLanes<Sum>; ++lane) inverse_[lane] = Sum(__builtin_exp(-Base::logsumexp_[lane]));
  }

  ATTNX_INLINE void differentiate(Vec<Sum> x, Vec<Sum> dp, int lane, const PanelOnTile<Sum>&, Vec<Sum>& p,
                                  Vec<Sum>& ds) const {
    Vec<Sum> e;
    const Vec<Sum> inverse = load(inverse_ + lane);
    p = softplus_of<A>(x, e) * inverse;
    ds = softplus_slope(x, e) * inverse * (dp - load(Base::offset_ + lane));
  }

 private:
  alignas(kVectorBytes) Sum inverse_[kPanelLanes<Sum>];  // 1 / Z
};

struct Softplus {
  static constexpr bool kNormalised = true, kSkipsTiles = false, kHasSink = false, kSumsProducts = false;
  template <class A>
  using Forward = SoftplusForward<A>;
  template <class A>
  using Backward = SoftplusBackward<A>;
};

}  // namespace attnx::cpu::ATTNX_ISA
