// The terms of one panel on one tile, and what they do to logits, weights and gradients in the loops.
//
// All that is added to the scaled products of a tile lies in one array as the products do, [keys][lanes], with -inf
// where a pair is hidden, by whatever. So the loops add one number to a product, whatever terms there are.
#pragma once

#include "../math.h"
#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Sum>
struct TermsOnTile : PanelOnTile<Sum> {
  static constexpr Sum kHidden = -__builtin_huge_valf();

  const Sum* added;
  Sum cap = 0, inverse_cap = 0;  // 0: none
  const Sum* factors = nullptr;  // of weights, after their sum is taken: 0 where dropped
  // Of the backward. Shares multiply weights before their sum is taken; what is hidden by a share of 0 has a gradient
  // of its own only.
  const Sum* shares = nullptr;
  const Sum* tangents = nullptr;  // the softcap's tanh
  Sum *grad_added = nullptr, *grad_shares = nullptr;

  TermsOnTile(const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys, const Sum* added_numbers, bool hides)
      : PanelOnTile<Sum>(panel, tile, keys), added(added_numbers) {
    this->masked |= hides;
  }

  bool sees(std::int64_t lane, std::int64_t key) const {
    const std::int64_t at = key * kPanelLanes<Sum> + lane;
    return added[at] != kHidden && (!shares || shares[at] != 0);
  }

  ATTNX_INLINE Vec<Sum> kept(std::int64_t at, Vec<Sum> x) const { return factors ? x * load(factors + at) : x; }
  template <class Score>
  ATTNX_INLINE Vec<Sum> bounded(const Score& score, int lane, Vec<Sum> x) const {
    return shares ? score.bounded(x, lane) : x;
  }
  template <class Score>
  ATTNX_INLINE void take_share(const Score& score, std::int64_t at, Vec<Sum> dp, Vec<Sum>& p, Vec<Sum>& ds) const {
    if (shares) {
      const Vec<Sum> share = load(shares + at);
      if (grad_shares) store(grad_shares + at, score.by_factor(p, dp, ds));
      p = share != 0 ? p * share : Vec<Sum>{};
      ds = share != 0 ? ds * share : Vec<Sum>{};
    }
    if (grad_added) store(grad_added + at, ds);
  }
  ATTNX_INLINE Vec<Sum> to_product(std::int64_t at, Vec<Sum> ds) const {
    if (!tangents) return ds;
    const Vec<Sum> t = load(tangents + at);
    return ds != 0 ? ds * (1 - t * t) : ds;  // where a key is hidden its product may be no number
  }
};

// The tanh of the softcap stays in the place of the product.
template <class A, class Body>
ATTNX_INLINE void for_each_logit(typename A::Sum* s, std::int64_t keys, typename A::Sum scale,
                                 const Panel<typename A::Sum>&, const TermsOnTile<typename A::Sum>& on_tile, int vector,
                                 Body body) {
  using Sum = typename A::Sum;
  constexpr int kStep = A::kStep, kWidth = kPanelLanes<Sum>;
  const int lane = vector * kLanes<Sum>;
  const auto loop = [&](auto capped, auto masked) __attribute__((always_inline)) {
    for (std::int64_t key = 0; key < keys; key += kStep) {
      Vec<Sum> x[kStep];
      Mask<Sum> visible[kStep];
      for (int k = 0; k < kStep; ++k) {
        const std::int64_t at = (key + k) * kWidth + lane;
        const Vec<Sum> added = load(on_tile.added + at);
        x[k] = load(s + at) * scale;
        if constexpr (capped.kValue) {
          const Vec<Sum> t = tanh(x[k] * on_tile.inverse_cap);
          store(s + at, t);
          x[k] = t * on_tile.cap;
        }
        x[k] += added;
        if constexpr (masked.kValue) visible[k] = added != TermsOnTile<Sum>::kHidden;
      }
      body(key, x, visible, masked);
    }
  };
  if (on_tile.masked) {
    on_tile.cap != 0 ? loop(Flag<true>{}, Flag<true>{}) : loop(Flag<false>{}, Flag<true>{});
  } else {
    on_tile.cap != 0 ? loop(Flag<true>{}, Flag<false>{}) : loop(Flag<false>{}, Flag<false>{});
  }
}

}  // namespace attnx::cpu::ATTNX_ISA
