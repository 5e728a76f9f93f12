// The backward loop does this with one panel of rows and one tile of keys.
#pragma once

#include "memory.h"

namespace attnx::cpu::ATTNX_ISA {

// What a score must know of a row before its first gradient may be a sum over its keys: the output, where rows are
// gathered, or what the score says.
template <class A, class Score, class Logits, bool kGathered>
class BackwardTile {
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  using Rows = BackwardRows<A, Score>;
  using Buffers = BackwardBuffers<A, Score, Logits>;
  static constexpr int kWidth = kPanelLanes<Sum>;

 public:
  BackwardTile(const BackwardParams& p, const BackwardSizes<Sum>& sizes) : p_(p), sizes_(sizes) {}

  // It computes S and dP of one tile.
  void multiply(Buffers& b, const Rows& r, std::int64_t keys) const {
    constexpr int kStep = A::kStep;
    gemm<A>({b.keys, sizes_.head_stride, kStep, r.query, kWidth * kStep, b.products, kWidth}, keys, r.panel->vectors,
            (p_.head_dim + kStep - 1) / kStep, false);
    gemm<A>({b.values, sizes_.value_stride, kStep, r.grad, kWidth * kStep, b.grad_weights, kWidth}, keys,
            r.panel->vectors, (p_.value_dim + kStep - 1) / kStep, false);
  }

  // What the rows need comes from the products of the tile.
  void add_products(Buffers& b, Rows& r, const PanelOnTile<Sum>& on_tile, std::int64_t keys) const {
    if constexpr (Score::kSumsProducts || (kGathered && Score::kNormalised)) {
      for (int v = 0; v < r.panel->vectors; ++v) {
        const int lane = v * kLanes<Sum>;
        Vec<Sum> sum = {};
        for_each_logit<A>(b.products, keys, Sum(p_.scale), *r.panel, on_tile, v,
                          [&](auto key, auto& x, auto& visible, auto masked) {
                            for (int k = 0; k < A::kStep; ++k) {
                              const Vec<Sum> dp = load(b.grad_weights + (key + k) * kWidth + lane);
                              const Vec<Sum> product = r.score->product(x[k], dp, lane);
                              if constexpr (masked.kValue) {
                                sum += visible[k] ? product : Vec<Sum>{};
                              } else {
                                sum += product;
                              }
                            }
                          });
        r.score->add_products(lane, sum);
      }
    }
  }

  void visit(const BackwardSums<Sum, Logits>& sums, Buffers& b, Rows& r, const KeyTile& tile, bool needs_sums) const {
    constexpr int kStep = A::kStep;
    const Panel<Sum>& panel = *r.panel;
    const std::int64_t key0 = tile.first, keys = panel.keys_seen(tile, A::kStep);
    const std::int64_t padded = round_up(keys, kStep);
    if (b.logits.hide(int(&r - b.panel), panel, tile, padded)) return;
    const auto on_tile = b.logits.on_tile(panel, tile, padded, b.products);
    multiply(b, r, padded);
    if (needs_sums) add_products(b, r, on_tile, padded);
    for (int v = 0; v < panel.vectors; ++v) weigh(b, r, on_tile, padded, v);
    b.logits.add_gradients(panel, tile, keys, sums.terms);

    // Hidden pairs have weights of zero, which is enough unless they would meet a NaN or an infinity.
    const auto add = [&](Finiteness& finite, const Element* other, std::int64_t count, const GemmOperands<A>& g,
                         std::int64_t rows, std::int64_t lanes, std::int64_t products, auto sees) {
      if (!on_tile.masked || finite(other, count)) {
        gemm<A>(g, rows, (lanes + kLanes<Sum> - 1) / kLanes<Sum>, (products + kStep - 1) / kStep, true);
      } else {
        gemm_where<A>(g, rows, lanes, products, sees);
      }
    };
    const auto key_by_lane = [&](std::int64_t key, std::int64_t, std::int64_t lane) { return on_tile.sees(lane, key); };
    const auto lane_by_key = [&](std::int64_t, std::int64_t lane, std::int64_t key) { return on_tile.sees(lane, key); };
    add(r.grad_finite, r.grad_rows, round_up(panel.rows, kStep) * sizes_.value_lanes,
        {b.weights, kWidth, kStep, r.grad_rows, sizes_.value_lanes * kStep, sums.grad_value + key0 * sizes_.value_lanes,
         sizes_.value_lanes},
        keys, p_.value_dim, panel.rows, key_by_lane);
    add(r.query_finite, r.query_rows, round_up(panel.rows, kStep) * sizes_.head_lanes,
        {b.grads, kWidth, kStep, r.query_rows, sizes_.head_lanes * kStep, sums.grad_key + key0 * sizes_.head_lanes,
         sizes_.head_lanes},
        keys, p_.head_dim, panel.rows, key_by_lane);
    add(b.keys_finite, b.keys, tile.count * sizes_.head_stride,
        {b.keys_by_step, kStep, sizes_.head_stride * kStep, b.grads_by_step, kWidth * kStep, r.grad_query, kWidth},
        p_.head_dim, panel.rows, keys, lane_by_key);
  }

 private:
  template <class OnTile>
  void weigh(Buffers& b, Rows& r, const OnTile& on_tile, std::int64_t keys, int v) const {
    const int lane = v * kLanes<Sum>;
    const auto score = *r.score;
    const Vec<Sum> position = load(on_tile.position + lane);
    Vec<Sum> bias = {}, slope = {};
    for_each_logit<A>(b.products, keys, Sum(p_.scale), *r.panel, on_tile, v,
                      [&](auto key, auto& x, auto& visible, auto masked) {
                        Vec<Sum> ds[A::kStep];
                        for (int k = 0; k < A::kStep; ++k) {
                          Vec<Sum> p;
                          const std::int64_t row = (key + k) * kWidth + lane;
                          const Vec<Sum> dp = on_tile.kept(row, load(b.grad_weights + row));
                          score.differentiate(on_tile.bounded(score, lane, x[k]), dp, lane, on_tile, p, ds[k]);
                          if constexpr (masked.kValue) {
                            p = visible[k] ? p : Vec<Sum>{};
                            ds[k] = visible[k] ? ds[k] : Vec<Sum>{};
                          }
                          on_tile.take_share(score, row, dp, p, ds[k]);
                          const Vec<Sum> product = on_tile.to_product(row, ds[k]);
                          A::store_row(b.weights + row, on_tile.kept(row, p));
                          A::store_row(b.grads + row, product);
                          bias += ds[k];
                          if (r.panel->alibi) slope += ds[k] * absolute(position - Sum(key + k));
                          ds[k] = product;
                        }
                        if constexpr (A::kStep > 1)
                          A::store_step(b.grads_by_step + step_index<A>(key, lane, kWidth), ds);
                      });
    for (int i = 0; i < kLanes<Sum>; ++i) {
      r.grad_bias[lane + i] += double(bias[i]);
      r.grad_slope[lane + i] -= double(slope[i]);
    }
  }

  const BackwardParams& p_;
  const BackwardSizes<Sum>& sizes_;
};

}  // namespace attnx::cpu::ATTNX_ISA
