// The weight is a power of how far the softplus of a logit stands above the row's mean, arXiv 2501.13428:
//
//     v = max(gain softplus(t) - shift, 0)      b = v^p      P = b / sum b
//
// which is max(n softplus(t) / Z - o, 0) over the largest such number of the row. A pass before this one knows gain and
// shift of each row (weights/softplus_rows.h); v is 1 at the largest logit, so that no power overflows.
#pragma once

#include "softplus.h"

namespace attnx::cpu::ATTNX_ISA {

// It returns x^n for n of 0 or more.
template <class V>
ATTNX_INLINE V power(V x, std::int64_t n) {
  V result = n & 1 ? x : 1 + V{};
  while (n >>= 1) {
    x *= x;
    if (n & 1) result *= x;
  }
  return result;
}

// These are the rows of a panel, with their v of a logit. Where v^p would be below 2^-100 beside a 1, v is 0: so none
// of it is subnormal, and more tiles have no weight at all.
template <class A>
class SharpenedRows {
  using Sum = typename A::Sum;
  static constexpr Sum kInfinity = __builtin_huge_valf();

 public:
  template <class Sequence>
  void begin(const AttentionParams& p, const Sequence& s, const Panel<Sum>& panel) {
    power_ = p.sharpening.power;
    lowest_ = Sum(__builtin_exp2(-100.0 / double(power_)));
    for (int lane = 0; lane < kPanelLanes<Sum>; ++lane) {
      const std::int64_t head = panel.head[lane], row = s.result_row(panel.query[lane]);
      gain_[lane] = *row_of<const Sum>(p.sharpening.gain, s.batch, head, row);
      shift_[lane] = *row_of<const Sum>(p.sharpening.shift, s.batch, head, row);
    }
  }

  std::int64_t power() const { return power_; }
  Sum gain(int lane) const { return gain_[lane]; }
  Sum shift(int lane) const { return shift_[lane]; }
  ATTNX_INLINE Vec<Sum> gains(int lane) const { return load(gain_ + lane); }

  ATTNX_INLINE Vec<Sum> above_mean(Vec<Sum> softplus, Vec<Sum> gain, Vec<Sum> shift) const {
    const Vec<Sum> v = softplus * gain - shift;
    return v <= lowest_ ? Vec<Sum>{} : v;  // a NaN stays one
  }
  ATTNX_INLINE Vec<Sum> above_mean(Vec<Sum> softplus, int lane) const {
    return above_mean(softplus, load(gain_ + lane), load(shift_ + lane));
  }

  // It returns the largest logit of which v is surely 0: ln(e^y - 1) of its softplus y, less what rounding moves.
  Sum threshold(int lane) const {
    const double y = (double(shift_[lane]) + double(lowest_)) / double(gain_[lane]);
    if (y != y) return -kInfinity;
    const double x = y > 30 ? y : __builtin_log(__builtin_expm1(y));
    return Sum(x - 1e-5 * (1 + __builtin_fabs(x)));
  }

 private:
  std::int64_t power_;
  Sum lowest_;
  alignas(kVectorBytes) Sum gain_[kPanelLanes<Sum>], shift_[kPanelLanes<Sum>];
};

template <class A>
class SharpenedSoftplusForward {
  using Sum = typename A::Sum;
  static constexpr Sum kInfinity = __builtin_huge_valf();

 public:
  template <class Sequence>
  void begin(const AttentionParams& p, const Sequence& s, const Panel<Sum>& panel, bool /*first_keys*/) {
    rows_.begin(p, s, panel);
    for (int lane = 0; lane < kPanelLanes<Sum>; ++lane) {
      sum_[lane] = 0;
      threshold_[lane] = rows_.threshold(lane);
    }
  }

  // It tells whether a logit of the tile has a weight.
  template <class OnTile>
  bool weighs(const Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const OnTile& on_tile) const {
    for (int v = 0; v < panel.vectors; ++v) {
      Vec<Sum> largest = splat(-kInfinity);
      for_each_logit<A>(s, keys, scale, panel, on_tile, v, [&](auto, auto& x, auto& visible, auto masked) {
        for (int k = 0; k < A::kStep; ++k) {
          if constexpr (masked.kValue) x[k] = visible[k] ? x[k] : splat(-kInfinity);
          largest = maximum(largest, x[k]);
        }
      });
      if (bits(largest > load(threshold_ + v * kLanes<Sum>)) != 0) return true;
    }
    return false;
  }
  bool weighs_row(const Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const PanelOnTile<Sum>& on_tile,
                  int row) const {
    Vec<Sum> largest = splat(-kInfinity);
    for_each_logit_of_row<A>(s, keys, scale, panel, on_tile, row, [&](auto, auto x, auto visible, auto masked) {
      if constexpr (masked.kValue) x = visible ? x : splat(-kInfinity);
      largest = maximum(largest, x);
    });
    return largest_lane<Sum>(largest) > threshold_[row];
  }

  template <class OnTile>
  void weigh(Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const OnTile& on_tile,
             typename A::Element* weights, Sum* /*output*/, std::int64_t /*value_dim*/) {
    for (int v = 0; v < panel.vectors; ++v) {
      const int lane = v * kLanes<Sum>;
      Vec<Sum> sum = {};
      for_each_logit<A>(s, keys, scale, panel, on_tile, v, [&](auto key, auto& x, auto& visible, auto masked) {
        Vec<Sum> p[A::kStep];
        for (int k = 0; k < A::kStep; ++k) {
          p[k] = power(rows_.above_mean(softplus_of<A>(x[k]), lane), rows_.power());
          if constexpr (masked.kValue) p[k] = visible[k] ? p[k] : Vec<Sum>{};
          sum += p[k];
        }
        A::store_step(weights + step_index<A>(key, lane, kPanelLanes<Sum>), p);
      });
      store(sum_ + lane, load(sum_ + lane) + sum);
    }
  }

  void weigh_row(Sum* s, std::int64_t keys, Sum scale, const Panel<Sum>& panel, const PanelOnTile<Sum>& on_tile,
                 int row, typename A::Element* weights, Sum* /*output*/, std::int64_t /*value_dim*/) {
    Vec<Sum> sum = {};
    const Vec<Sum> gain = splat(rows_.gain(row)), shift = splat(rows_.shift(row));
    for_each_logit_of_row<A>(s, keys, scale, panel, on_tile, row, [&](auto key, auto x, auto visible, auto masked) {
      Vec<Sum> p = power(rows_.above_mean(softplus_of<A>(x), gain, shift), rows_.power());
      if constexpr (masked.kValue) p = visible ? p : Vec<Sum>{};
      sum += p;
      A::store_row(weights + key, p);
    });
    sum_[row] += sum_of_lanes<Sum>(sum);
  }

  Sum output_factor(const Panel<Sum>&, int lane) const { return sum_[lane] == 0 ? 0 : 1 / sum_[lane]; }
  Sum logsumexp(const Panel<Sum>&, int lane) const { return Sum(__builtin_log(sum_[lane])); }

 private:
  SharpenedRows<A> rows_;
  alignas(kVectorBytes) Sum sum_[kPanelLanes<Sum>], threshold_[kPanelLanes<Sum>];
};

// With w = v^(p - 1), the sum S of the b of the row, and D = dP - dO . O:
//
//     P = v w / S      dt = sigmoid(t) p / S (gain w D - share sum_j w_j D_j)
//
// where share is gain / n, or 0 in a row from whose weights no mean is taken. The sum is that of a loop before.
template <class A>
class SharpenedSoftplusBackward : public NormalisedBackward<A> {
  using Sum = typename A::Sum;
  using Base = NormalisedBackward<A>;

 public:
  template <class Input, class Sequence>
  void begin(const BackwardParams& p, const Sequence& s, const Panel<Sum>& panel) {
    Base::template begin<Input>(p, s, panel);
    rows_.begin(p, s, panel);
    for (int lane = 0; lane < kPanelLanes<Sum>; ++lane) {
      const std::int64_t keys = panel.visible[lane].end - panel.visible[lane].first;
      inverse_[lane] = Sum(__builtin_exp(-Base::logsumexp_[lane]));
      factor_[lane] = Sum(rows_.power()) * inverse_[lane];
      share_[lane] = rows_.shift(lane) == 0 ? 0 : rows_.gain(lane) / Sum(keys);
      sums_[lane] = 0;
    }
  }

  ATTNX_INLINE Vec<Sum> product(Vec<Sum> x, Vec<Sum> dp, int lane) const {
    const Vec<Sum> v = rows_.above_mean(softplus_of<A>(x), lane);
    return lower_power(v) * (dp - load(Base::offset_ + lane));
  }
  ATTNX_INLINE void add_products(int lane, Vec<Sum> products) { store(sums_ + lane, load(sums_ + lane) + products); }

  ATTNX_INLINE void differentiate(Vec<Sum> x, Vec<Sum> dp, int lane, const PanelOnTile<Sum>&, Vec<Sum>& p,
                                  Vec<Sum>& ds) const {
    Vec<Sum> e;
    const Vec<Sum> v = rows_.above_mean(softplus_of<A>(x, e), lane), w = lower_power(v);
    p = v * w * load(inverse_ + lane);
    const Vec<Sum> of_mean = load(share_ + lane) * load(sums_ + lane);
    const Vec<Sum> own = rows_.gains(lane) * w * (dp - load(Base::offset_ + lane));
    ds = softplus_slope(x, e) * load(factor_ + lane) * (own - of_mean);
  }

 private:
  ATTNX_INLINE Vec<Sum> lower_power(Vec<Sum> v) const { return v == 0 ? Vec<Sum>{} : power(v, rows_.power() - 1); }

  SharpenedRows<A> rows_;
  alignas(kVectorBytes) Sum inverse_[kPanelLanes<Sum>], factor_[kPanelLanes<Sum>];  // 1 / S, p / S
  alignas(kVectorBytes) Sum share_[kPanelLanes<Sum>], sums_[kPanelLanes<Sum>];
};

struct SharpenedSoftplus {
  static constexpr bool kNormalised = true, kSkipsTiles = true, kHasSink = false, kSumsProducts = true;
  template <class A>
  using Forward = SharpenedSoftplusForward<A>;
  template <class A>
  using Backward = SharpenedSoftplusBackward<A>;
};

}  // namespace attnx::cpu::ATTNX_ISA
