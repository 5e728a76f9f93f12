// This finds the weights of each row, or what all of its logits tell: a unit of work owns a few panels of rows, and
// walks over the keys that they see.
#pragma once

#include "../units.h"
#include "tile.h"

namespace attnx::cpu::ATTNX_ISA {

// The weights themselves, [row][key].
template <class Input, class Score>
class RowWeights {
 public:
  using Tile = WeightsTile<Input>;
  using Sum = typename Tile::Sum;
  using Params = RowWeightsParams;

  void begin(const WeightsParams& p, const Sequence& s, const Panel<Sum>& panel) {
    weight_.begin(p, {}, s, panel);
    for (int lane = 0; lane < panel.rows; ++lane) set_zero(row(p, s, panel, lane), p.length_k);
  }
  void add(const WeightsParams& p, const Sequence& s, Tile& tile, const KeyTile& keys, std::int64_t i) {
    Sum* const weights = tile.products();  // each takes the place of its product
    const auto weigh = [&](auto key, int vector, auto& x, auto& visible, auto masked) {
      const int lane = vector * kLanes<Sum>;
      for (int k = 0; k < Tile::A::kStep; ++k) {
        Vec<Sum> weight = weight_.weight(x[k], lane);
        if constexpr (masked.kValue) weight = visible[k] ? weight : Vec<Sum>{};
        store(weights + (key + k) * Tile::kWidth + lane, weight);
      }
    };
    tile.for_each(keys, 0, weigh, i);
    for (int lane = 0; lane < tile.panel(i).rows; ++lane) {
      Sum* const to = row(p, s, tile.panel(i), lane) + keys.first;
      for (std::int64_t key = 0; key < keys.count; ++key) to[key] = weights[key * Tile::kWidth + lane];
    }
  }
  void finish(const WeightsParams&, const Sequence&, const Panel<Sum>&) const {}

 private:
  RowWeight<Sum, Score> weight_;

  static Sum* row(const WeightsParams& p, const Sequence& s, const Panel<Sum>& panel, int lane) {
    const std::int64_t head = s.batch * p.heads_q + panel.head[lane];
    return static_cast<Sum*>(p.result) + (head * p.length_q + panel.query[lane]) * p.length_k;
  }
};

// The largest logit of a row, -inf where it sees no key.
template <class Input>
class MaxLogits {
 public:
  using Tile = WeightsTile<Input>;
  using Sum = typename Tile::Sum;
  using Params = MaxLogitsParams;

  void begin(const WeightsParams&, const Sequence&, const Panel<Sum>&) {
    for (Sum& x : largest_) x = -kInfinity;
  }
  void add(const WeightsParams&, const Sequence&, Tile& tile, const KeyTile& keys, std::int64_t i) {
    const auto compare = [&](auto key, int vector, auto& x, auto& visible, auto masked) {
      const int lane = vector * kLanes<Sum>;
      Vec<Sum> largest = load(largest_ + lane);
      for (int k = 0; k < Tile::A::kStep; ++k) {
        if (key + k >= keys.count) break;  // a step's padding
        Vec<Sum> logit = x[k];
        if constexpr (masked.kValue) logit = visible[k] ? logit : splat(-kInfinity);
        largest = maximum(largest, logit);
      }
      store(largest_ + lane, largest);
    };
    tile.for_each(keys, 0, compare, i);
  }
  void finish(const WeightsParams& p, const Sequence& s, const Panel<Sum>& panel) const {
    for (int lane = 0; lane < panel.rows; ++lane) {
      const std::int64_t head = s.batch * p.heads_q + panel.head[lane];
      static_cast<Sum*>(p.result)[head * p.length_q + panel.query[lane]] = largest_[lane];
    }
  }

 private:
  static constexpr Sum kInfinity = __builtin_huge_valf();
  alignas(kVectorBytes) Sum largest_[Tile::kWidth];
};

template <class Input, class Result>
class ByRow {
  using Tile = typename Result::Tile;
  using Params = typename Result::Params;
  using A = typename Tile::A;

 public:
  ByRow(const Params& p, const Executor& executor) : p_(p), executor_(executor) {
    while (panels_ > 1 && units() < 4 * executor.threads) panels_ /= 2;
  }

  std::int64_t workspace_bytes() const { return executor_.threads * Buffers(p_, panels_, nullptr).arena.used(); }

  void run(char* workspace) const {
    for_each_unit(executor_, units(), workspace, Buffers(p_, panels_, nullptr).arena.used(),
                  [&](std::int64_t unit, char* memory) {
                    const std::int64_t head = unit / units_of_head();
                    visit(head / p_.heads_q, head % p_.heads_q, unit % units_of_head() * unit_rows(), memory);
                  });
  }

 private:
  struct Buffers {
    Arena arena;
    Tile tile;
    Result* result;  // of each panel

    Buffers(const Params& p, std::int64_t panels, char* block)
        : arena(block), tile(p, 1, panels, arena), result(arena.take<Result>(panels)) {}
  };

  std::int64_t unit_rows() const { return panels_ * Tile::kWidth; }
  std::int64_t units_of_head() const { return (p_.length_q + unit_rows() - 1) / unit_rows(); }
  std::int64_t units() const { return p_.batch * p_.heads_q * units_of_head(); }

  void visit(std::int64_t batch, std::int64_t head, std::int64_t row0, char* memory) const {
    Buffers b(p_, panels_, memory);
    const Sequence s(p_, batch);
    const BandTiles tiles(p_, s, head, 0);
    const StridedStorage<Input, A> storage(p_, s, head / (p_.heads_q / p_.heads_k));
    std::int64_t panels = 0;
    KeyRange any{s.length_k, 0};
    for (std::int64_t row = row0; row < smaller(s.length_q, row0 + unit_rows()); row += Tile::kWidth, ++panels) {
      b.tile.load_rows(s, tiles, head, row, panels);
      const KeyRange seen = b.tile.panel(panels).any;
      any = {smaller(any.first, seen.first), larger(any.end, seen.end)};
      b.result[panels].begin(p_, s, b.tile.panel(panels));
    }
    tiles.for_each(any, Tile::kKeys, [&](const KeyTile& tile) {
      b.tile.load_keys(storage, tile, 0);
      for (std::int64_t i = 0; i < panels; ++i) {
        const KeyRange seen = b.tile.panel(i).any;
        if (seen.first < tile.first + tile.count && seen.end > tile.first) b.result[i].add(p_, s, b.tile, tile, i);
      }
    });
    for (std::int64_t i = 0; i < panels; ++i) b.result[i].finish(p_, s, b.tile.panel(i));
  }

  const Params& p_;
  const Executor& executor_;
  std::int64_t panels_ = Tile::kMostPanels;  // of a unit
};

}  // namespace attnx::cpu::ATTNX_ISA
