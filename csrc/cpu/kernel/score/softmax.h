// The weight is P = exp(logit - logsumexp of the row), with the running maximum and sum of Milakov and Gimelshein,
// arXiv 1805.02867.
#pragma once

#include "../math.h"
#include "normalised.h"

namespace attnx::cpu::ATTNX_ISA {

template <class A>
class SoftmaxForward {
  using Sum = typename A::Sum;
  static constexpr Sum kInfinity = __builtin_huge_valf();

 public:
  // A row begins with its sink, which plain softmax does not have. It does so only with the first part of its keys, so
  // that the sink counts once.
  template <class Sequence>
  void begin(const AttentionParams& p, const Sequence&, const Panel<Sum>& panel, bool first_keys) {
    for (int lane = 0; lane < kPanelLanes<Sum>; ++lane) {
      maximum_[lane] = first_keys ? panel.per_head(p.sink, panel.head[lane], -kInfinity) : -kInfinity;
      sum_[lane] = maximum_[lane] == -kInfinity ? 0 : 1;
    }
  }

  // It does what the sigmoid's weigh does; output[value_dim][lanes] is rescaled where a maximum rises.
  template <class OnTile>
  void weigh(Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const OnTile& on_tile,
             typename A::Element* weights, Sum* output, std::int64_t value_dim) {
    constexpr int kWidth = kPanelLanes<Sum>;
    for (int v = 0; v < panel.vectors; ++v) {
      const int lane = v * kLanes<Sum>;
      const Vec<Sum> before = load(maximum_ + lane);
      Vec<Sum> highest = before;
      for_each_logit<A>(s, keys, scale, panel, on_tile, v, [&](auto key, auto& x, auto& visible, auto masked) {
        for (int k = 0; k < A::kStep; ++k) {
          if constexpr (masked.kValue) x[k] = visible[k] ? x[k] : splat(-kInfinity);
          highest = maximum(highest, x[k]);
          store(s + (key + k) * kWidth + lane, x[k]);
        }
      });
      // Any finite maximum will do for a row that has seen no key yet.
      const Vec<Sum> shift = highest == -kInfinity ? Vec<Sum>{} : highest;
      Vec<Sum> sum = {};
      for (std::int64_t key = 0; key < keys; key += A::kStep) {
        Vec<Sum> p[A::kStep];
        for (int k = 0; k < A::kStep; ++k) {
          const Vec<Sum> x = load(s + (key + k) * kWidth + lane);
          p[k] = exp(x - shift);
          sum += p[k];
          on_tile.take_derivative((key + k) * kWidth + lane, lane, p[k]);
          p[k] = on_tile.kept((key + k) * kWidth + lane, p[k]);
        }
        A::store_step(weights + step_index<A>(key, lane, kWidth), p);
      }
      if (__builtin_memcmp(&before, &highest, sizeof before) != 0) {
        const Vec<Sum> factor = exp(before - shift);
        store(sum_ + lane, load(sum_ + lane) * factor);
        for (std::int64_t d = 0; d < value_dim; ++d)
          store(output + d * kWidth + lane, load(output + d * kWidth + lane) * factor);
        store(maximum_ + lane, highest);
      }
      store(sum_ + lane, load(sum_ + lane) + sum);
    }
  }

  // It does the same for one row, s[keys], and its output[value_dim]: the weights are an A operand.
  void weigh_row(Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const PanelOnTile<Sum>& on_tile,
                 int row, typename A::Element* weights, Sum* output, std::int64_t value_dim) {
    Vec<Sum> highest = splat(maximum_[row]);
    for_each_logit_of_row<A>(s, keys, scale, panel, on_tile, row, [&](auto key, auto x, auto visible, auto masked) {
      if constexpr (masked.kValue) x = visible ? x : splat(-kInfinity);
      highest = maximum(highest, x);
      store(s + key, x);
    });
    const Sum before = maximum_[row];
    maximum_[row] = largest_lane<Sum>(highest);
    // Any finite maximum will do for a row that has seen no key yet.
    const Sum shift = maximum_[row] == -kInfinity ? 0 : maximum_[row];
    Vec<Sum> sum = {};
    for (std::int64_t key = 0; key < keys; key += kLanes<Sum>) {
      const Vec<Sum> x = load(s + key);
      const Vec<Sum> p = exp(x - shift);
      sum += p;
      A::store_row(weights + key, p);
    }
    if (__builtin_memcmp(&before, &maximum_[row], sizeof before) != 0) {
      const Sum factor = exp(splat(before - shift))[0];
      sum_[row] *= factor;
      for (std::int64_t d = 0; d < value_dim; ++d) output[d] *= factor;
    }
    sum_[row] += sum_of_lanes<Sum>(sum);
  }

  // A row whose logits are all -inf is one that sees nothing. A NaN among them shows in the sum.
  Sum output_factor(const Panel<Sum>& panel, int lane) const {
    if (sees_nothing(panel, lane)) return 0;
    return maximum_[lane] == -kInfinity ? 0 * sum_[lane] : 1 / sum_[lane];
  }
  Sum logsumexp(const Panel<Sum>& panel, int lane) const {
    return sees_nothing(panel, lane) ? maximum_[lane] : maximum_[lane] + Sum(__builtin_log(sum_[lane]));
  }

 private:
  alignas(kVectorBytes) Sum maximum_[kPanelLanes<Sum>], sum_[kPanelLanes<Sum>];
};

template <class A>
class SoftmaxBackward : public NormalisedBackward<A> {
  using Sum = typename A::Sum;
  using NormalisedBackward<A>::logsumexp_;
  using NormalisedBackward<A>::offset_;
  static constexpr Sum kInfinity = __builtin_huge_valf();

 public:
  ATTNX_INLINE Vec<Sum> weight(Vec<Sum> x, int lane) const { return exp(x - load(logsumexp_ + lane)); }
  ATTNX_INLINE Vec<Sum> product(Vec<Sum> x, Vec<Sum> dp, int lane) const { return weight(x, lane) * dp; }

  ATTNX_INLINE void differentiate(Vec<Sum> x, Vec<Sum> dp, int lane, const PanelOnTile<Sum>&, Vec<Sum>& p,
                                  Vec<Sum>& ds) const {
    p = weight(x, lane);
    ds = p * (dp - load(offset_ + lane));
  }

  // It returns a logit whose weight is finite, and the derivative by a factor of the weight.
  ATTNX_INLINE Vec<Sum> bounded(Vec<Sum> x, int lane) const {
    const Vec<Sum> most = load(logsumexp_ + lane) + Sum(sizeof(Sum) == 4 ? 88 : 700);
    return x > most ? most : x;
  }
  ATTNX_INLINE Vec<Sum> by_factor(Vec<Sum> /*p*/, Vec<Sum> /*dp*/, Vec<Sum> ds) const { return ds; }

  // It returns the derivative by the sink, whose dP is 0. The sink's weight is all that a row without keys has.
  double grad_sink(const AttentionParams& p, const Panel<Sum>& panel, int lane) const {
    const Sum sink = panel.per_head(p.sink, panel.head[lane], -kInfinity);
    if (sink == -kInfinity) return 0;
    const double weight = sees_nothing(panel, lane) ? 1 : __builtin_exp(double(sink) - double(logsumexp_[lane]));
    return -weight * double(offset_[lane]);
  }
};

struct Softmax {
  static constexpr bool kNormalised = true, kSkipsTiles = false, kHasSink = true, kSumsProducts = false;
  template <class A>
  using Forward = SoftmaxForward<A>;
  template <class A>
  using Backward = SoftmaxBackward<A>;
};

}  // namespace attnx::cpu::ATTNX_ISA
