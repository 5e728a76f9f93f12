// Sums over rows of their weights: a unit of work owns some keys, and walks over the rows that see them. Sums have one
// order, whoever makes them.
#pragma once

#include "../units.h"
#include "tile.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input, class Score>
class KeyWeights {
  using Tile = WeightsTile<Input>;
  using A = typename Tile::A;
  using Sum = typename A::Sum;
  static constexpr std::int64_t kTiles = 4;  // of keys, for which rows are laid out once
  static constexpr std::int64_t kUnitKeys = kTiles * Tile::kKeys;

 public:
  KeyWeights(const KeyWeightsParams& p, const Executor& executor) : p_(p), executor_(executor) {}

  std::int64_t workspace_bytes() const { return executor_.threads * Buffers(p_, nullptr).arena.used(); }

  void run(char* workspace) const {
    const std::int64_t parts = (p_.length_k + kUnitKeys - 1) / kUnitKeys;
    for_each_unit(executor_, p_.batch * p_.heads_q * parts, workspace, Buffers(p_, nullptr).arena.used(),
                  [&](std::int64_t unit, char* memory) {
                    sum(unit / parts / p_.heads_q, unit / parts % p_.heads_q, unit % parts * kUnitKeys, memory);
                  });
  }

 private:
  struct Buffers {
    Arena arena;
    Tile tile;
    RowWeight<Sum, Score>* weight;
    Sum* sums;  // [key][lane]

    Buffers(const KeyWeightsParams& p, char* block)
        : arena(block),
          tile(p, kTiles, 1, arena),
          weight(arena.take<RowWeight<Sum, Score>>(1)),
          sums(arena.take<Sum>(kUnitKeys * kLanes<Sum>)) {}
  };

  void sum(std::int64_t batch, std::int64_t head, std::int64_t first, char* memory) const {
    Buffers b(p_, memory);
    const Sequence s(p_, batch);
    const BandTiles tiles(p_, s, head, 0);
    const StridedStorage<Input, A> storage(p_, s, head / (p_.heads_q / p_.heads_k));
    const std::int64_t end = smaller(first + kUnitKeys, s.length_k);
    set_zero(b.sums, kUnitKeys * kLanes<Sum>);
    std::int64_t place = 0;
    tiles.for_each({first, end}, Tile::kKeys, [&](const KeyTile& tile) { b.tile.load_keys(storage, tile, place++); });
    for (std::int64_t row = 0; row < s.length_q; row += Tile::kWidth) {
      if (!see(tiles, s, row, {first, end})) continue;
      b.tile.load_rows(s, tiles, head, row);
      b.weight->begin(p_, p_.row_weights, s, b.tile.panel());
      const KeyRange seen = b.tile.panel().any;
      tiles.for_each({larger(first, seen.first), smaller(end, seen.end)}, Tile::kKeys, [&](const KeyTile& tile) {
        add(b, tile, (tile.first - first) / Tile::kKeys, b.sums + (tile.first - first) * kLanes<Sum>);
      });
    }
    Sum* const to = static_cast<Sum*>(p_.result) + (batch * p_.heads_q + head) * p_.length_k;
    for (std::int64_t key = first; key < end; ++key)
      to[key] = sum_of_lanes<Sum>(load(b.sums + (key - first) * kLanes<Sum>));
  }

  // Whether one of the rows of the panel from this one on sees one of the keys.
  bool see(const BandTiles& tiles, const Sequence& s, std::int64_t row, KeyRange keys) const {
    const std::int64_t last = smaller<std::int64_t>(row + Tile::kWidth, s.length_q) - 1,
                       offset = s.length_k - s.length_q;
    return tiles.row(row + offset).first < keys.end && tiles.row(last + offset).end > keys.first;
  }

  void add(Buffers& b, const KeyTile& tile, std::int64_t place, Sum* sums) const {
    const RowWeight<Sum, Score> weight = *b.weight;
    b.tile.for_each(tile, place, [&](auto key, int vector, auto& x, auto& visible, auto masked) {
      const int lane = vector * kLanes<Sum>;
      for (int k = 0; k < A::kStep; ++k) {
        Sum* const sum = sums + (key + k) * kLanes<Sum>;
        Vec<Sum> p = weight.weight(x[k], lane) * weight.count(lane);
        if constexpr (masked.kValue) p = visible[k] ? p : Vec<Sum>{};
        store(sum, load(sum) + p);
      }
    });
  }

  const KeyWeightsParams& p_;
  const Executor& executor_;
};

}  // namespace attnx::cpu::ATTNX_ISA
