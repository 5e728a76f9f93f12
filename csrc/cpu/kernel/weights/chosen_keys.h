// This finds the key of the largest logit of each row, or of the largest after each got a draw, for class ByRow.
#pragma once

#include "../gumbel.h"
#include "../logits/terms.h"
#include "tile.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input>
class ChosenKeys {
 public:
  using Tile = WeightsTile<Input, LogitsWithTerms>;
  using Sum = typename Tile::Sum;
  using Params = ChosenKeysParams;

  void begin(const Params&, const Sequence&, const Panel<Sum>&) {
    for (int lane = 0; lane < Tile::kWidth; ++lane) largest_[lane] = -kInfinity, key_[lane] = -1;
  }
  void add(const Params& p, const Sequence& s, Tile& tile, const KeyTile& keys, std::int64_t i) {
    const bool draws = p.temperature != 0;
    if (draws) draw(p, s, tile.panel(i), keys);
    for (MaskInt<Sum>& x : place_) x = -1;
    const auto compare = [&](auto key, int vector, auto& x, auto& visible, auto masked) {
      const int lane = vector * kLanes<Sum>;
      Vec<Sum> largest = load(largest_ + lane);
      Mask<Sum> place = load(place_ + lane);
      for (int k = 0; k < Tile::A::kStep; ++k) {
        if (key + k >= keys.count) break;  // a step's padding
        Vec<Sum> logit = x[k];
        if (draws) logit += load(draws_ + (key + k) * Tile::kWidth + lane);
        if constexpr (masked.kValue) logit = visible[k] ? logit : splat(-kInfinity);
        const Mask<Sum> is_larger = logit > largest;  // of equals the first stays, and NaN is no larger than any
        largest = is_larger ? logit : largest;
        place = is_larger ? Mask<Sum>{} + MaskInt<Sum>(key + k) : place;
      }
      store(largest_ + lane, largest);
      store(place_ + lane, place);
    };
    tile.for_each(keys, 0, compare, i);
    for (int lane = 0; lane < tile.panel(i).rows; ++lane)
      if (place_[lane] >= 0) key_[lane] = keys.first + place_[lane];
  }
  void finish(const Params& p, const Sequence& s, const Panel<Sum>& panel) const {
    for (int lane = 0; lane < panel.rows; ++lane) {
      const std::int64_t head = s.batch * p.heads_q + panel.head[lane];
      static_cast<std::int64_t*>(p.result)[head * p.length_q + panel.query[lane]] = key_[lane];
    }
  }

 private:
  static constexpr Sum kInfinity = __builtin_huge_valf();

  void draw(const Params& p, const Sequence& s, const Panel<Sum>& panel, const KeyTile& keys) {
    const GumbelDraw draw{std::uint64_t(*p.seed), std::uint32_t(*p.offset)};
    fill_gumbel(draw, panel, s.batch * p.heads_q, keys, Sum(p.temperature), draws_);
  }

  alignas(kVectorBytes) Sum largest_[Tile::kWidth], draws_[Tile::kKeys * Tile::kWidth];
  alignas(kVectorBytes) MaskInt<Sum> place_[Tile::kWidth];  // within the tile; -1: none is larger than those before
  std::int64_t key_[Tile::kWidth];
};

}  // namespace attnx::cpu::ATTNX_ISA
