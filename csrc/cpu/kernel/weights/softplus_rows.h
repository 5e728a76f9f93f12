// This finds what the sharpened softplus must know of a row before it weighs the first key: gain and shift, which
// follow from the sum Z of the row's softplus and from its largest logit.
//
//     u = n softplus(t) / Z - o      v = u / u_max = gain softplus(t) - shift
//
// o is 1, but 0 where a row sees at most three keys. Where all keys weigh the same no logit stands above the mean: u is
// 0, and so are gain and shift. What is left of rounding does not decide about that, but whether logits differ.
#pragma once

#include "../score/softplus.h"
#include "tile.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class SoftplusRows {
 public:
  using Tile = WeightsTile<Input>;
  using Sum = typename Tile::Sum;
  using Params = SoftplusRowsParams;

 private:
  using A = typename Tile::A;
  static constexpr Sum kInfinity = __builtin_huge_valf();
  static constexpr std::int64_t kKeysWithoutMean = 3;
  alignas(kVectorBytes) Sum sum_[Tile::kWidth], largest_[Tile::kWidth], smallest_[Tile::kWidth];

 public:
  void begin(const WeightsParams&, const Sequence&, const Panel<Sum>&) {
    for (int lane = 0; lane < Tile::kWidth; ++lane)
      sum_[lane] = 0, largest_[lane] = -kInfinity, smallest_[lane] = kInfinity;
  }
  void add(const WeightsParams&, const Sequence&, Tile& tile, KeyTile keys, std::int64_t i) {
    keys.count = tile.panel(i).keys_seen(keys, A::kStep);
    const auto visit = [&](int vector, const auto& for_each_logit) {
      const int lane = vector * kLanes<Sum>;
      Vec<Sum> sum = {}, largest = load(largest_ + lane), smallest = load(smallest_ + lane);
      for_each_logit([&](auto, auto& x, auto& visible, auto masked) {
        for (int k = 0; k < A::kStep; ++k) {
          Vec<Sum> p = softplus_of<A>(x[k]);
          if constexpr (masked.kValue) {
            p = visible[k] ? p : Vec<Sum>{};
            largest = maximum(largest, visible[k] ? x[k] : splat(-kInfinity));
            smallest = minimum(smallest, visible[k] ? x[k] : splat(kInfinity));
          } else {
            largest = maximum(largest, x[k]);
            smallest = minimum(smallest, x[k]);
          }
          sum += p;
        }
      });
      store(sum_ + lane, load(sum_ + lane) + sum);
      store(largest_ + lane, largest);
      store(smallest_ + lane, smallest);
    };
    tile.for_each_vector(keys, 0, visit, i);
  }
  void finish(const WeightsParams& p, const Sequence& s, const Panel<Sum>& panel) const {
    for (int lane = 0; lane < panel.rows; ++lane) {
      const std::int64_t keys = panel.visible[lane].end - panel.visible[lane].first,
                         row = s.result_row(panel.query[lane]);
      const double sum = sum_[lane], mean = keys > kKeysWithoutMean ? 1 : 0, x = largest_[lane];
      const double softplus = (x > 0 ? x : 0) + __builtin_log1p(__builtin_exp(x > 0 ? -x : x));
      const double most = double(keys) * softplus / sum - mean;
      const bool none = sum == 0 || most <= 0 || (mean == 1 && largest_[lane] == smallest_[lane] && sum == sum);
      *row_of<Sum>(p.sharpening.gain, s.batch, panel.head[lane], row) = none ? 0 : Sum(double(keys) / sum / most);
      *row_of<Sum>(p.sharpening.shift, s.batch, panel.head[lane], row) = none ? 0 : Sum(mean / most);
    }
  }
};

}  // namespace attnx::cpu::ATTNX_ISA
