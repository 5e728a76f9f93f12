// Query rows on the vector lanes, keys and values read by broadcast: for many rows.
//
//     S^T[keys][rows] = K Q^T      weights = Score(S^T)      O^T[features][rows] += V^T weights
#pragma once

#include "../arena.h"
#include "../gemm.h"
#include "../logits/plain.h"
#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

template <class A, class Score, class Logits = PlainLogits>
class QueriesOnLanes {
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  static constexpr int kWidth = kPanelLanes<Sum>;

 public:
  static constexpr std::int64_t kKeys = 96;  // of a tile; a multiple of kRowMultiple
  static_assert(kKeys % kRowMultiple == 0 && kKeys % A::kStep == 0);

  QueriesOnLanes(const AttentionParams& p, std::int64_t panels, Arena& arena)
      : p_(p),
        head_stride_(round_up(p.head_dim, kRowMultiple)),
        value_stride_(round_up(p.value_dim, kRowMultiple)),
        logits_(p, panels, arena) {
    keys_ = arena.take<Element>(kKeys * larger(head_stride_, round_up(p.head_dim, A::kStep)));
    values_ = arena.take<Element>(kKeys * value_stride_);
    values_by_step_ = A::kStep == 1 ? values_ : arena.take<Element>(kKeys * value_stride_);
    rows_ = arena.take<Element>(kWidth * head_stride_);
    products_ = arena.take<Sum>(kKeys * kWidth);
    // A product becomes a weight in its place where the types allow.
    weights_ = A::kStep == 1 ? reinterpret_cast<Element*>(products_) : arena.take<Element>(kKeys * kWidth);
    for (int i = 0; i < panels; ++i) {
      query_[i] = arena.take<Element>(head_stride_ * kWidth);
      output_[i] = arena.take<Sum>(value_stride_ * kWidth);
    }
    scores_ = arena.take<typename Score::template Forward<A>>(panels);
  }

  // Panel i begins, with the query rows row(0), row(1), ..., and with the first of its keys or with a later part.
  template <class Sequence, class Row>
  void begin(int i, const Panel<Sum>& panel, const Sequence& sequence, bool first_keys, Row row) {
    load_rows<A>(row, panel.rows, p_.head_dim, rows_, head_stride_);
    transpose_rows<A>(rows_, panel.rows, p_.head_dim, head_stride_, query_[i]);
    __builtin_memset(output_[i], 0, std::size_t(value_stride_ * kWidth) * sizeof(Sum));
    scores_[i].begin(p_, sequence, panel, first_keys);
    logits_.begin(i, panel, sequence);
  }

  template <class Storage>
  void load(const Storage& storage, const KeyTile& tile) {
    logits_.set_tile(tile);
    values_finite_.forget();
    if constexpr (Storage::kSteps) {
      key_row_ = A::kStep, key_step_ = kKeys * A::kStep;
      storage.load_key_steps(tile.first, tile.count, keys_, kKeys);
      storage.load_value_steps(tile.first, tile.count, values_by_step_, value_stride_);
    } else {
      key_row_ = head_stride_, key_step_ = A::kStep;
      storage.load_keys(tile.first, tile.count, keys_, head_stride_);
      storage.load_values(tile.first, tile.count, values_, value_stride_);
      if constexpr (A::kStep > 1)
        interleave_rows<A>(values_, tile.count, value_stride_, values_by_step_, value_stride_);
    }
  }

  void visit(int i, const Panel<Sum>& panel, const KeyTile& tile) {
    const std::int64_t keys = panel.keys_seen(tile, A::kStep), padded = round_up(keys, A::kStep),
                       steps = padded / A::kStep;
    if (logits_.hide(i, panel, tile, padded)) return;
    gemm<A>({keys_, key_row_, key_step_, query_[i], kWidth * A::kStep, products_, kWidth}, padded, panel.vectors,
            (p_.head_dim + A::kStep - 1) / A::kStep, false);
    const auto on_tile = logits_.on_tile(panel, tile, padded);
    if constexpr (Score::kSkipsTiles)
      if (!scores_[i].weighs(products_, padded, Sum(p_.scale), panel, on_tile)) return;
    scores_[i].weigh(products_, padded, Sum(p_.scale), panel, on_tile, weights_, output_[i], p_.value_dim);
    const GemmOperands<A> g{values_by_step_, A::kStep, value_stride_ * A::kStep, weights_, kWidth * A::kStep,
                            output_[i],      kWidth};
    if (!on_tile.masked || values_finite_(values_by_step_, round_up(tile.count, A::kStep) * value_stride_)) {
      gemm<A>(g, p_.value_dim, panel.vectors, steps, true);
    } else {
      gemm_where<A>(g, p_.value_dim, panel.rows, keys,
                    [&](std::int64_t, std::int64_t lane, std::int64_t key) { return on_tile.sees(lane, key); });
    }
  }

  // One row when all keys were visited.
  template <class Output>
  void finish(int i, const Panel<Sum>& panel, int row, Output* output, Sum* logsumexp) const {
    store_lane(output_[i], row, p_.value_dim, logits_.output_factor(scores_[i].output_factor(panel, row)), output);
    if constexpr (Score::kNormalised) *logsumexp = scores_[i].logsumexp(panel, row);
  }

 private:
  const AttentionParams& p_;
  std::int64_t head_stride_, value_stride_;
  Finiteness values_finite_;                 // of a tile
  std::int64_t key_row_ = 0, key_step_ = 0;  // strides of keys_ as an A operand
  Element *keys_, *values_, *values_by_step_, *rows_, *weights_;
  Element* query_[4];
  Sum* products_;
  Sum* output_[4];
  typename Score::template Forward<A>* scores_;
  typename Logits::template Forward<A, Score> logits_;
};

}  // namespace attnx::cpu::ATTNX_ISA
