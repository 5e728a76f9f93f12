// Logits with terms besides the scaled product and what belongs to the row, the tile and the distance: a softcap, a
// mask of pairs, biases and shares of keys, and dropout of their weights. attnx::LogitTerms defines them.
#pragma once

#include "../gemm.h"
#include "build.h"
#include "sums.h"

namespace attnx::cpu::ATTNX_ISA {

struct LogitsWithTerms {
  static constexpr bool kHasTerms = true;
  using Sums = TermSums;

  template <class A, class Score>
  class Forward {
    using Sum = typename A::Sum;
    static constexpr std::int64_t kMostKeys = 96;  // of a tile

   public:
    Forward(const AttentionParams& p, std::int64_t panels, Arena& arena)
        : build_(p, true, true, kMostKeys, panels, arena) {}

    template <class Sequence>
    void begin(int i, const Panel<Sum>& panel, const Sequence& s) {
      build_.begin(i, panel, s);
    }
    void set_tile(const KeyTile& tile) { build_.set_tile(tile); }
    bool hide(int i, const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys) {
      if (build_.fill(i, panel, tile, keys)) return true;
      if (Sum *const kept = build_.kept(), *const shares = build_.shares(); !Score::kNormalised && kept && shares)
        for (std::int64_t at = 0; at < keys * kPanelLanes<Sum>; ++at) kept[at] *= shares[at];
      return false;
    }
    TermsOnTile<Sum> on_tile(const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys) const {
      auto x = build_.on_tile(panel, tile, keys);
      x.factors = build_.kept() || Score::kNormalised ? build_.kept() : build_.shares();
      return x;
    }
    // A weight that is kept stands for those that are not.
    Sum output_factor(Sum of_score) const { return of_score * Sum(build_.dropout().factor()); }

   private:
    TermBuilder<Sum, Score::kNormalised> build_;
  };

  template <class A, class Score>
  class Backward {
    using Sum = typename A::Sum;
    static constexpr int kWidth = kPanelLanes<Sum>;

   public:
    Backward(const BackwardParams& p, std::int64_t tile_keys, std::int64_t panels, Arena& arena)
        : p_(p), build_(p, !p.grad_key_mask.data, false, tile_keys, panels, arena) {
      const bool of_added =
          p.grad_key_bias.data || p.grad_attn_mask.data || p.grad_query_table.data || p.grad_key_table.data;
      if (of_added) grad_added_ = arena.take<Sum>(tile_keys * kWidth);
      if (p.grad_key_mask.data) grad_shares_ = arena.take<Sum>(tile_keys * kWidth);
    }

    template <class Sequence>
    void begin(int i, const Panel<Sum>& panel, const Sequence& s) {
      build_.begin(i, panel, s);
      batch_ = s.batch;
    }
    void set_tile(const KeyTile& tile) { build_.set_tile(tile); }
    bool hide(int i, const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys) {
      return build_.fill(i, panel, tile, keys);
    }
    TermsOnTile<Sum> on_tile(const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys,
                             const Sum* products) const {
      auto x = build_.on_tile(panel, tile, keys);
      x.factors = build_.kept();
      x.shares = build_.shares();
      x.grad_added = grad_added_;
      x.grad_shares = grad_shares_;
      if (p_.terms.softcap != 0) x.tangents = products;
      return x;
    }

    // The gradients of the terms of a tile, of so many keys, are added to those of the mask and of the tables, and to
    // the sums over rows.
    void add_gradients(const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys, const Sums& sums) const {
      if (grad_added_) add(grad_added_, panel, tile, keys, sums.added, sums.keys, sums.distances, true);
      if (p_.grad_key_table.data) add_to_key_table(grad_added_, panel, tile, keys);
      if (grad_shares_) add(grad_shares_, panel, tile, keys, sums.shares, sums.keys, nullptr, false);
    }

   private:
    void add(const Sum* grad, const Panel<Sum>& panel, const KeyTile& tile, std::int64_t count, double* sums,
             std::int64_t sum_keys, double* by_distance, bool of_added) const {
      const std::int64_t group = p_.heads_q / p_.heads_k;
      const PairMask& mask = p_.grad_attn_mask;
      const bool to_mask = of_added && mask.data && mask.row_stride != 0 && !mask.by_distance();
      const bool to_table = of_added && p_.grad_query_table.data;
      for (int lane = 0; lane < panel.rows; lane += kLanes<Sum>)
        for (std::int64_t key = 0; key < count; key += kLanes<Sum>) {
          const std::int64_t keys = smaller<std::int64_t>(kLanes<Sum>, count - key);
          Vec<Sum> x[kLanes<Sum>];
          for (int i = 0; i < kLanes<Sum>; ++i) x[i] = load(grad + (key + i) * kWidth + lane);
          transpose_lanes<Sum>(x);
          Vec<Sum> sum = {};
          for (int i = 0; i < kLanes<Sum> && lane + i < panel.rows; ++i) {
            if (to_mask) add_to(mask_row(panel, lane + i, tile.first + key), x[i], keys);
            if (by_distance)
              add_to(by_distance + panel.head[lane + i] % group * distances(p_) + tile.first + key -
                         panel.query[lane + i] + p_.length_q - 1,
                     x[i], keys);
            if (to_table) add_to_query_table(panel, lane + i, tile.first + key, x[i], keys);
            sum += x[i];
            if (!sums || (group == 1 && i + 1 < kLanes<Sum> && lane + i + 1 < panel.rows)) continue;
            // Rows of one head are summed up first.
            add_to(sums + panel.head[lane + i] % group * sum_keys + tile.first + key, sum, keys);
            sum = Vec<Sum>{};
          }
        }
    }
    // The gradients of a query's row, from so many keys from the first on.
    void add_to_query_table(const Panel<Sum>& panel, int lane, std::int64_t first, Vec<Sum> x,
                            std::int64_t keys) const {
      const std::int64_t query = panel.query[lane];
      Sum* const row = row_of<Sum>(p_.grad_query_table, batch_, panel.head[lane], query);
      if (keys == kLanes<Sum>) return build_.tables().add_of_keys(row, query, first, x);
      for (std::int64_t i = 0; i < keys; ++i) row[build_.tables().number(query, first + i)] += x[i];
    }
    // The gradients of the keys' rows.
    void add_to_key_table(const Sum* grad, const Panel<Sum>& panel, const KeyTile& tile, std::int64_t count) const {
      const bool one_head = p_.heads_q == p_.heads_k;
      for (std::int64_t key = tile.first; key < tile.first + count; ++key, grad += kWidth)
        for (int lane = 0; lane < panel.rows; lane += kLanes<Sum>) {
          const auto row = [&](int i) { return row_of<Sum>(p_.grad_key_table, batch_, panel.head[lane + i], key); };
          if (one_head && lane + kLanes<Sum> <= panel.rows) {
            build_.tables().add_of_queries(row(0), panel.query[lane], key, load(grad + lane));
            continue;
          }
          for (int i = 0; i < kLanes<Sum> && lane + i < panel.rows; ++i)
            row(i)[build_.tables().number(panel.query[lane + i], key)] += grad[lane + i];
        }
    }
    Sum* mask_row(const Panel<Sum>& panel, int lane, std::int64_t key) const {
      const PairMask& mask = p_.grad_attn_mask;
      return static_cast<Sum*>(const_cast<void*>(mask.data)) + batch_ * mask.batch_stride +
             panel.head[lane] * mask.head_stride + panel.query[lane] * mask.row_stride + key * mask.key_stride;
    }
    // Keys of these gradients are contiguous.
    template <class To>
    static void add_to(To* to, Vec<Sum> x, std::int64_t keys) {
      if (keys == kLanes<Sum>) {
        for (int i = 0; i < kLanes<Sum>; ++i) to[i] += To(x[i]);
      } else {
        for (int i = 0; i < keys; ++i) to[i] += To(x[i]);
      }
    }

    const BackwardParams& p_;
    TermBuilder<Sum, false> build_;
    Sum *grad_added_ = nullptr, *grad_shares_ = nullptr;  // [keys][lanes]
    std::int64_t batch_ = 0;
  };
};

}  // namespace attnx::cpu::ATTNX_ISA
