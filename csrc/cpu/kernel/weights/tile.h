// Logits of panels of rows and a tile of keys, without values: S^T = K Q^T, with the rows on the lanes.
#pragma once

#include "../arena.h"
#include "../gemm.h"
#include "../logits/plain.h"
#include "../rows.h"
#include "../storage/strided.h"
#include "../tiles/band.h"
#include "attnx/weights_params.h"

namespace attnx::cpu::ATTNX_ISA {

// This is what the policies of logits ask of a score.
struct OfLogits {
  static constexpr bool kNormalised = true;
};

template <class Input, class Logits = PlainLogits>
class WeightsTile {
 public:
  using A = Arithmetic<Input>;
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  static constexpr int kWidth = kPanelLanes<Sum>;
  static constexpr std::int64_t kKeys = 96;  // of a tile; a multiple of kRowMultiple
  static_assert(kKeys % kRowMultiple == 0 && kKeys % A::kStep == 0);

  static constexpr std::int64_t kMostPanels = 4;

  // It holds `tiles` tiles of keys, and `panels` of rows.
  WeightsTile(const WeightsParams& p, std::int64_t tiles, std::int64_t panels, Arena& arena)
      : p_(p), logits_(p, panels, arena), stride_(round_up(p.head_dim, kRowMultiple)) {
    keys_ = arena.take<Element>(tiles * kKeys * stride_);
    rows_ = arena.take<Element>(kWidth * stride_);
    for (std::int64_t i = 0; i < panels; ++i) query_[i] = arena.take<Element>(kWidth * stride_);
    products_ = arena.take<Sum>(kKeys * kWidth);
    panel_ = arena.take<Panel<Sum>>(panels);
  }

  const Panel<Sum>& panel(std::int64_t i = 0) const { return panel_[i]; }
  Sum* products() const { return products_; }

  // Rows from this one on, of one query head, become panel i.
  void load_rows(const Sequence& s, const BandTiles& tiles, std::int64_t head, std::int64_t row, std::int64_t i = 0) {
    panel_[i].set(p_, s, tiles, head, 1, row, smaller<std::int64_t>(kWidth, s.length_q - row));
    logits_.begin(i, panel_[i], s);
    ATTNX_ISA::load_rows<A>(
        [&](std::int64_t n) { return row_of<const Input>(p_.query, s.batch, head, s.first_q + row + n); },
        panel_[i].rows, p_.head_dim, rows_, stride_);
    transpose_rows<A>(rows_, panel_[i].rows, p_.head_dim, stride_, query_[i]);
  }

  void load_keys(const StridedStorage<Input, A>& storage, const KeyTile& tile, std::int64_t place) {
    storage.load_keys(tile.first, tile.count, keys_ + place * kKeys * stride_, stride_);
  }

  // Calls visit(vector, loop) for each vector of the rows of panel i: loop(body) calls body(key, x, visible, masked)
  // for their logits of the tile that was loaded at this place, as for_each_logit does; key counts from the tile's
  // first.
  template <class Visit>
  void for_each_vector(const KeyTile& tile, std::int64_t place, Visit visit, std::int64_t i = 0) {
    const std::int64_t keys = round_up(tile.count, A::kStep);
    logits_.set_tile(tile);
    if (logits_.hide(i, panel_[i], tile, keys)) return;
    gemm<A>({keys_ + place * kKeys * stride_, stride_, A::kStep, query_[i], kWidth * A::kStep, products_, kWidth}, keys,
            panel_[i].vectors, (p_.head_dim + A::kStep - 1) / A::kStep, false);
    const auto on_tile = logits_.on_tile(panel_[i], tile, keys);
    for (int v = 0; v < panel_[i].vectors; ++v)
      visit(v, [&](auto body) __attribute__((always_inline)) {
        for_each_logit<A>(products_, keys, Sum(p_.scale), panel_[i], on_tile, v, body);
      });
  }

  // Calls body(key, vector, x, visible, masked) for all of these logits.
  template <class Body>
  void for_each(const KeyTile& tile, std::int64_t place, Body body, std::int64_t i = 0) {
    const auto visit = [&](int v, const auto& loop) __attribute__((always_inline)) {
      loop([&](auto key, auto& x, auto& visible, auto masked) { body(key, v, x, visible, masked); });
    };
    for_each_vector(tile, place, visit, i);
  }

 private:
  const WeightsParams& p_;
  typename Logits::template Forward<A, OfLogits> logits_;
  std::int64_t stride_;
  Element *keys_, *rows_, *query_[kMostPanels];
  Sum* products_;
  Panel<Sum>* panel_;
};

// The weight of a logit, and what it counts in sums over rows. The lanes after the last row count 0.
template <class Sum, class Score>
class RowWeight {
  static constexpr Sum kInfinity = __builtin_huge_valf();

 public:
  void begin(const WeightsParams& p, const PerRow& w, const Sequence& s, const Panel<Sum>& panel) {
    for (int lane = 0; lane < kPanelLanes<Sum>; ++lane) {
      const std::int64_t head = panel.head[lane], row = panel.query[lane];
      if constexpr (Score::kNormalised) {
        const Sum logsumexp = *row_of<const Sum>(p.logsumexp, s.batch, head, row);
        // A row that sees nothing has no weights.
        logsumexp_[lane] = logsumexp == -kInfinity ? kInfinity : logsumexp;
      }
      const Sum count =
          w.data ? static_cast<const Sum*>(w.data)[s.batch * w.batch_stride + head * w.head_stride + row] : 1;
      counts_[lane] = lane < panel.rows ? count : 0;
    }
  }

  ATTNX_INLINE Vec<Sum> weight(Vec<Sum> x, int lane) const {
    if constexpr (Score::kNormalised) {
      return exp(x - load(logsumexp_ + lane));
    } else {
      Vec<Sum> complement;
      return weight_and_complement(x, Sum(1), complement);
    }
  }
  ATTNX_INLINE Vec<Sum> count(int lane) const { return load(counts_ + lane); }

 private:
  alignas(kVectorBytes) Sum logsumexp_[kPanelLanes<Sum>], counts_[kPanelLanes<Sum>];
};

}  // namespace attnx::cpu::ATTNX_ISA
