// A logit is the scaled product plus what belongs to its row, its tile and its distance, and nothing else. What the
// loops ask of these terms beyond that costs nothing here.
#pragma once

#include "../arena.h"
#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

struct PlainLogits {
  static constexpr bool kHasTerms = false;

  // What a unit of the backward sums over its query rows.
  struct Sums {
    template <class Sizes>
    Sums(const Sizes&, Arena&) {}
  };

  // What a worker of the forward keeps of the terms.
  template <class A, class Score>
  struct Forward {
    using Sum = typename A::Sum;

    Forward(const AttentionParams&, std::int64_t /*panels*/, Arena&) {}
    template <class Sequence>
    void begin(int /*panel*/, const Panel<Sum>&, const Sequence&) {}
    void set_tile(const KeyTile&) {}
    // Whether the terms hide all keys of the tile from the panel.
    bool hide(int /*panel*/, const Panel<Sum>&, const KeyTile&, std::int64_t /*keys*/) { return false; }
    PanelOnTile<Sum> on_tile(const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys) const {
      return {panel, tile, keys};
    }
    Sum output_factor(Sum of_score) const { return of_score; }
  };

  // The same of the backward.
  template <class A, class Score>
  struct Backward {
    using Sum = typename A::Sum;

    Backward(const BackwardParams&, std::int64_t /*tile_keys*/, std::int64_t /*panels*/, Arena&) {}
    template <class Sequence>
    void begin(int /*panel*/, const Panel<Sum>&, const Sequence&) {}
    void set_tile(const KeyTile&) {}
    bool hide(int /*panel*/, const Panel<Sum>&, const KeyTile&, std::int64_t /*keys*/) { return false; }
    PanelOnTile<Sum> on_tile(const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys,
                             const Sum* /*products*/) const {
      return {panel, tile, keys};
    }
    void add_gradients(const Panel<Sum>&, const KeyTile&, std::int64_t /*keys*/, const Sums&) const {}
  };
};

}  // namespace attnx::cpu::ATTNX_ISA
