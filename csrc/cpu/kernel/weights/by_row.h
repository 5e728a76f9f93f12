// Weights, or the largest logit, of each row: a unit of work owns a panel of rows, and walks over the keys that they
// see.
#pragma once

#include "../units.h"
#include "tile.h"

namespace attnx::cpu::ATTNX_ISA {

// The weights themselves, [row][key].
template <class Input, class Score>
class RowWeights {
  using Tile = WeightsTile<Input>;
  using Sum = typename Tile::Sum;
  RowWeight<Sum, Score> weight_;

 public:
  void begin(const WeightsParams& p, const Sequence& s, const Panel<Sum>& panel) {
    weight_.begin(p, {}, s, panel);
    for (int lane = 0; lane < panel.rows; ++lane) set_zero(row(p, s, panel, lane), p.length_k);
  }
  void add(const WeightsParams& p, const Sequence& s, Tile& tile, const KeyTile& keys) {
    Sum* const weights = tile.products();  // each takes the place of its product
    tile.for_each(keys, 0, [&](auto key, int vector, auto& x, auto& visible, auto masked) {
      const int lane = vector * kLanes<Sum>;
      for (int k = 0; k < Tile::A::kStep; ++k) {
        Vec<Sum> weight = weight_.weight(x[k], lane);
        if constexpr (masked.kValue) weight = visible[k] ? weight : Vec<Sum>{};
        store(weights + (key + k) * Tile::kWidth + lane, weight);
      }
    });
    for (int lane = 0; lane < tile.panel().rows; ++lane) {
      Sum* const to = row(p, s, tile.panel(), lane) + keys.first;
      for (std::int64_t key = 0; key < keys.count; ++key) to[key] = weights[key * Tile::kWidth + lane];
    }
  }
  void finish(const WeightsParams&, const Sequence&, const Panel<Sum>&) const {}

 private:
  static Sum* row(const WeightsParams& p, const Sequence& s, const Panel<Sum>& panel, int lane) {
    const std::int64_t head = s.batch * p.heads_q + panel.head[lane];
    return static_cast<Sum*>(p.result) + (head * p.length_q + panel.query[lane]) * p.length_k;
  }
};

// The largest logit of a row, -inf where it sees no key.
template <class Input>
class MaxLogits {
  using Tile = WeightsTile<Input>;
  using Sum = typename Tile::Sum;
  static constexpr Sum kInfinity = __builtin_huge_valf();
  alignas(kVectorBytes) Sum largest_[Tile::kWidth];

 public:
  void begin(const WeightsParams&, const Sequence&, const Panel<Sum>&) {
    for (Sum& x : largest_) x = -kInfinity;
  }
  void add(const WeightsParams&, const Sequence&, Tile& tile, const KeyTile& keys) {
    tile.for_each(keys, 0, [&](auto key, int vector, auto& x, auto& visible, auto masked) {
      const int lane = vector * kLanes<Sum>;
      Vec<Sum> largest = load(largest_ + lane);
      for (int k = 0; k < Tile::A::kStep; ++k) {
        if (key + k >= keys.count) break;  // a step's padding
        Vec<Sum> logit = x[k];
        if constexpr (masked.kValue) logit = visible[k] ? logit : splat(-kInfinity);
        largest = maximum(largest, logit);
      }
      store(largest_ + lane, largest);
    });
  }
  void finish(const WeightsParams& p, const Sequence& s, const Panel<Sum>& panel) const {
    for (int lane = 0; lane < panel.rows; ++lane) {
      const std::int64_t head = s.batch * p.heads_q + panel.head[lane];
      static_cast<Sum*>(p.result)[head * p.length_q + panel.query[lane]] = largest_[lane];
    }
  }
};

template <class Input, class Result>
class ByRow {
  using Tile = WeightsTile<Input>;
  using A = typename Tile::A;
  using Sum = typename A::Sum;

 public:
  ByRow(const WeightsParams& p, const Executor& executor) : p_(p), executor_(executor) {}

  std::int64_t workspace_bytes() const { return executor_.threads * Buffers(p_, nullptr).arena.used(); }

  void run(char* workspace) const {
    const std::int64_t panels = (p_.length_q + Tile::kWidth - 1) / Tile::kWidth;
    for_each_unit(executor_, p_.batch * p_.heads_q * panels, workspace, Buffers(p_, nullptr).arena.used(),
                  [&](std::int64_t unit, char* memory) {
                    visit(unit / panels / p_.heads_q, unit / panels % p_.heads_q, unit % panels * Tile::kWidth, memory);
                  });
  }

 private:
  struct Buffers {
    Arena arena;
    Tile tile;
    Result* result;

    Buffers(const WeightsParams& p, char* block) : arena(block), tile(p, 1, arena), result(arena.take<Result>(1)) {}
  };

  void visit(std::int64_t batch, std::int64_t head, std::int64_t row, char* memory) const {
    Buffers b(p_, memory);
    const Sequence s(p_, batch);
    if (row >= s.length_q) return;
    const BandTiles tiles(p_, s, head, 0);
    const StridedStorage<Input, A> storage(p_, s, head / (p_.heads_q / p_.heads_k));
    b.tile.load_rows(s, tiles, head, row);
    b.result->begin(p_, s, b.tile.panel());
    tiles.for_each(b.tile.panel().any, Tile::kKeys, [&](const KeyTile& tile) {
      b.tile.load_keys(storage, tile, 0);
      b.result->add(p_, s, b.tile, tile);
    });
    b.result->finish(p_, s, b.tile.panel());
  }

  const WeightsParams& p_;
  const Executor& executor_;
};

}  // namespace attnx::cpu::ATTNX_ISA
