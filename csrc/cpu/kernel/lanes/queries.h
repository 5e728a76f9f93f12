// Query rows on the vector lanes, keys and values read by broadcast: for many rows.
//
//     S^T[keys][rows] = K Q^T      weights = Score(S^T)      O^T[features][rows] += V^T weights
#pragma once

#include "../arena.h"
#include "../gemm.h"
#include "../logits/plain.h"
#include "../rows.h"
#include "../tangents/none.h"

namespace attnx::cpu::ATTNX_ISA {

template <class A, class Score, class Logits = PlainLogits, template <class, class> class Tangents = NoTangents>
class QueriesOnLanes {
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  static constexpr int kWidth = kPanelLanes<Sum>;

 public:
  using Rows = typename Tangents<A, Score>::Rows;  // what rows leave
  using Params = typename Rows::Params;

  static constexpr std::int64_t kKeys = 96;  // of a tile; a multiple of kRowMultiple
  static_assert(kKeys % kRowMultiple == 0 && kKeys % A::kStep == 0);

  QueriesOnLanes(const Params& p, std::int64_t panels, Arena& arena)
      : p_(p),
        head_stride_(round_up(p.head_dim, kRowMultiple)),
        value_stride_(round_up(p.value_dim, kRowMultiple)),
        logits_(p, panels, arena),
        tangents_(p, panels, kKeys, arena) {
    keys_ = arena.take<Element>(kKeys * larger(head_stride_, round_up(p.head_dim, A::kStep)));
    values_ = arena.take<Element>(kKeys * value_stride_);
    values_by_step_ = A::kStep == 1 ? values_ : arena.take<Element>(kKeys * value_stride_);
    rows_ = arena.take<Element>(kWidth * head_stride_);
    products_ = arena.take<Sum>(kKeys * kWidth);
    // A product becomes a weight in its place where the types allow.
    weights_ = A::kStep == 1 ? reinterpret_cast<Element*>(products_) : arena.take<Element>(kKeys * kWidth);
    for (int i = 0; i < panels; ++i) {
      query_[i] = arena.take<Element>(head_stride_ * kWidth);
      output_[i] = arena.take<Sum>(numbers() * kWidth);
    }
    scores_ = arena.take<typename Score::template Forward<A>>(panels);
  }

  // Panel i begins, with the rows rows_of(p.query)(0), (1), ..., and with the first of its keys or with a later part.
  template <class Sequence, class RowsOf>
  void begin(int i, const Panel<Sum>& panel, const Sequence& sequence, bool first_keys, const RowsOf& rows_of) {
    load_rows<A>(rows_of(p_.query), panel.rows, p_.head_dim, rows_, head_stride_);
    transpose_rows<A>(rows_, panel.rows, p_.head_dim, head_stride_, query_[i]);
    set_zero(output_[i], numbers() * kWidth);
    scores_[i].begin(p_, sequence, panel, first_keys);
    logits_.begin(i, panel, sequence);
    tangents_.begin(i, panel, rows_of, rows_);
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
    tangents_.load_tile(storage, tile);
  }

  void visit(int i, const Panel<Sum>& panel, const KeyTile& tile) {
    const std::int64_t keys = panel.keys_seen(tile, A::kStep), padded = round_up(keys, A::kStep),
                       steps = padded / A::kStep;
    if (logits_.hide(i, panel, tile, padded)) return;
    const auto multiply = [&](const Element* rows, const Element* query, Sum* to, bool accumulate) {
      gemm<A>({rows ? rows : keys_, key_row_, key_step_, query ? query : query_[i], kWidth * A::kStep, to, kWidth},
              padded, panel.vectors, (p_.head_dim + A::kStep - 1) / A::kStep, accumulate);
    };
    multiply(keys_, query_[i], products_, false);
    tangents_.multiply(i, panel, tile, multiply);
    const auto on_tile = logits_.on_tile(panel, tile, padded);
    if constexpr (Score::kSkipsTiles)
      if (!scores_[i].weighs(products_, padded, Sum(p_.scale), panel, on_tile)) return;
    tangents_.weigh(i, on_tile, [&](const auto& on_tile) {
      scores_[i].weigh(products_, padded, Sum(p_.scale), panel, on_tile, weights_, output_[i],
                       tangents_.numbers(p_.value_dim));
    });
    const auto add = [&](const Element* values, Finiteness* finite, const Element* weights, Sum* to) {
      if (!values) values = values_by_step_, finite = &values_finite_;
      const GemmOperands<A> g{
          values, A::kStep, value_stride_ * A::kStep, weights ? weights : weights_, kWidth * A::kStep, to, kWidth};
      if (!on_tile.masked || (*finite)(values, round_up(tile.count, A::kStep) * value_stride_)) {
        gemm<A>(g, p_.value_dim, panel.vectors, steps, true);
      } else {
        gemm_where<A>(g, p_.value_dim, panel.rows, keys,
                      [&](std::int64_t, std::int64_t lane, std::int64_t key) { return on_tile.sees(lane, key); });
      }
    };
    add(nullptr, nullptr, nullptr, output_[i]);
    tangents_.add(panel, padded, output_[i], add);
  }

  // One row when all keys were visited.
  template <class Row>
  void finish(int i, const Panel<Sum>& panel, int row, const Row& to) const {
    const Sum factor = logits_.output_factor(scores_[i].output_factor(panel, row));
    store_lane(output_[i], row, p_.value_dim, factor, to.output);
    if constexpr (Score::kNormalised) *to.logsumexp = scores_[i].logsumexp(panel, row);
    tangents_.finish(i, row, output_[i], factor, to);
  }

 private:
  // A row has so many sums.
  std::int64_t numbers() const { return tangents_.numbers(p_.value_dim); }

  const Params& p_;
  std::int64_t head_stride_, value_stride_;
  Finiteness values_finite_;                 // of a tile
  std::int64_t key_row_ = 0, key_step_ = 0;  // strides of keys_ as an A operand
  Element *keys_, *values_, *values_by_step_, *rows_, *weights_;
  Element* query_[4];
  Sum* products_;
  Sum* output_[4];
  typename Score::template Forward<A>* scores_;
  typename Logits::template Forward<A, Score> logits_;
  Tangents<A, Score> tangents_;
};

}  // namespace attnx::cpu::ATTNX_ISA
