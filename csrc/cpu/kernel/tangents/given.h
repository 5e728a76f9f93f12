// Query, key and value have tangents, and so has what comes of them. With T = scale (dQ K^T + Q dK^T) and P' the
// derivative of a weight by its logit, the weights have the tangents dP = P' T, and
//
//     dO = dP V + P dV
//
// For softmax P' is P as long as its sum is not taken: then dL = sum_j P_j T_j is the tangent of the logsumexp, and
// dO = (P T) V + P dV - dL O. So one pass does, with the running maximum of softmax: the sums of P T and of the rows of
// dO lie behind those of O in memory, and are rescaled with them.
//
// A number that all T of a row have in common moves the logsumexp alone; what it adds to (P T) V is subtracted again.
// So T is measured from a reference, its mean over the row's first tile of keys, and these sums stay small.
#pragma once

#include "../arena.h"
#include "../epilogue/tangents.h"
#include "../gemm.h"

namespace attnx::cpu::ATTNX_ISA {

// A score tells it the derivative of each weight by its logit.
template <class Sum>
struct TangentsOnTile : PanelOnTile<Sum> {
  Sum* tangents;         // of the products, [keys][lanes]; those of the weights take their places
  const Sum* reference;  // of a row
  Sum scale;

  // Nothing comes of a hidden key, whatever it holds.
  ATTNX_INLINE void take_derivative(std::int64_t at, int lane, Vec<Sum> derivative) const {
    const Vec<Sum> tangent = load(tangents + at) * scale - load(reference + lane);
    store(tangents + at, derivative == 0 ? Vec<Sum>{} : derivative * tangent);
  }
};

template <class A, class Score>
class GivenTangents {
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  static constexpr int kWidth = kPanelLanes<Sum>;

 public:
  using Rows = TangentRows<Sum>;

  GivenTangents(const JvpParams& p, std::int64_t panels, std::int64_t keys, Arena& arena)
      : p_(p), head_stride_(round_up(p.head_dim, kRowMultiple)), value_stride_(round_up(p.value_dim, kRowMultiple)) {
    const std::int64_t by_step = A::kStep > 1;
    if (p.tangent_key.data) keys_ = arena.take<Element>(keys * larger(head_stride_, round_up(p.head_dim, A::kStep)));
    if (p.tangent_value.data) {
      values_ = arena.take<Element>(keys * value_stride_);
      values_by_step_ = by_step ? arena.take<Element>(keys * value_stride_) : values_;
    }
    if (p.moves_logits()) {
      tangents_ = arena.take<Sum>(keys * kWidth);
      weights_ = by_step ? arena.take<Element>(keys * kWidth) : reinterpret_cast<Element*>(tangents_);
      reference_ = arena.take<Sum>(panels * kWidth);
    }
    if (p.tangent_query.data)
      for (int i = 0; i < panels; ++i) query_[i] = arena.take<Element>(head_stride_ * kWidth);
  }

  // A row's sums are its output, the tangent of that, and the sum of the tangents of its weights.
  static std::int64_t numbers(std::int64_t value_dim) { return 2 * value_dim + 1; }

  template <class RowsOf>
  void begin(int i, const Panel<Sum>& panel, const RowsOf& rows_of, Element* rows) {
    if (reference_) set_zero(reference_ + i * kWidth, kWidth);
    if (!p_.tangent_query.data) return;
    load_rows<A>(rows_of(p_.tangent_query), panel.rows, p_.head_dim, rows, head_stride_);
    transpose_rows<A>(rows, panel.rows, p_.head_dim, head_stride_, query_[i]);
  }

  template <class Storage>
  void load_tile(const Storage& storage, const KeyTile& tile) {
    values_finite_.forget();
    if (p_.tangent_key.data) storage.tangents().load_keys(tile.first, tile.count, keys_, head_stride_);
    if (!p_.tangent_value.data) return;
    storage.tangents().load_values(tile.first, tile.count, values_, value_stride_);
    if constexpr (A::kStep > 1) interleave_rows<A>(values_, tile.count, value_stride_, values_by_step_, value_stride_);
  }

  // multiply(keys, query, to, accumulate) is the product of rows of keys and a panel of queries; null: the tile's own.
  template <class Multiply>
  void multiply(int i, const Panel<Sum>& panel, const KeyTile& tile, const Multiply& multiply) {
    if (!p_.moves_logits()) return;
    if (p_.tangent_query.data) multiply(nullptr, query_[i], tangents_, false);
    if (p_.tangent_key.data) multiply(keys_, nullptr, tangents_, p_.tangent_query.data != nullptr);
    if constexpr (Score::kNormalised) set_reference(panel, tile, reference_ + i * kWidth);
  }

  // weigh(on_tile) makes the weights of the tile, and then their tangents.
  template <class Weigh>
  void weigh(int i, const PanelOnTile<Sum>& on_tile, const Weigh& weigh) const {
    if (p_.moves_logits()) {
      weigh(TangentsOnTile<Sum>{on_tile, tangents_, reference_ + i * kWidth, Sum(p_.scale)});
    } else {
      weigh(on_tile);
    }
  }

  // add(values, finite, weights, to) adds the product of values and weights; null: the tile's own.
  template <class Add>
  void add(const Panel<Sum>& panel, std::int64_t keys, Sum* sums, const Add& add) {
    Sum* const tangent = sums + p_.value_dim * kWidth;
    if (p_.tangent_value.data) add(values_by_step_, &values_finite_, nullptr, tangent);
    if (!p_.moves_logits()) return;
    for (int v = 0; v < panel.vectors; ++v) add_weights(keys, v * kLanes<Sum>, tangent + p_.value_dim * kWidth);
    add(nullptr, nullptr, weights_, tangent);
  }

  template <class Row>
  void finish(int i, int lane, const Sum* sums, Sum factor, const Row& to) const {
    const bool moving = Score::kNormalised && p_.moves_logits();
    const Sum moves = moving ? sums[2 * p_.value_dim * kWidth + lane] * factor : 0;  // of dL, from the reference on
    if constexpr (Score::kNormalised) *to.tangent_logsumexp = moving ? reference_[i * kWidth + lane] + moves : 0;
    Sum row[kMaxHeadDim];
    for (std::int64_t d = 0; d < p_.value_dim; ++d, sums += kWidth) {
      row[d] = sums[p_.value_dim * kWidth + lane] * factor;
      if (moving) row[d] -= moves * (sums[lane] * factor);
    }
    convert_row(to.tangent_output, row, p_.value_dim);
  }

 private:
  // The rows whose first keys are in this tile get their references from it.
  void set_reference(const Panel<Sum>& panel, const KeyTile& tile, Sum* reference) const {
    for (int lane = 0; lane < panel.vectors * kLanes<Sum>; lane += kLanes<Sum>) {
      Mask<Sum> first = {}, end = {};
      bool begins = false;
      for (int i = 0; i < kLanes<Sum>; ++i) {
        const KeyRange& seen = panel.visible[lane + i];
        if (seen.first < tile.first || seen.first >= smaller(seen.end, tile.first + tile.count)) continue;
        begins = true;
        first[i] = MaskInt<Sum>(seen.first - tile.first);
        end[i] = MaskInt<Sum>(smaller(seen.end - tile.first, tile.count));
      }
      if (!begins) continue;
      Vec<Sum> sum = {}, count = {};
      for (std::int64_t key = 0; key < tile.count; ++key) {
        const auto visible = (first <= MaskInt<Sum>(key)) & (end > MaskInt<Sum>(key));
        sum += visible ? load(tangents_ + key * kWidth + lane) : Vec<Sum>{};
        count += visible ? splat(Sum(1)) : Vec<Sum>{};
      }
      store(reference + lane, count > 0 ? sum * Sum(p_.scale) / count : load(reference + lane));
    }
  }

  // The tangents of a vector of weights are added up, and become a B operand.
  void add_weights(std::int64_t keys, int lane, Sum* sums) const {
    Vec<Sum> sum = {};
    for (std::int64_t key = 0; key < keys; key += A::kStep) {
      Vec<Sum> x[A::kStep];
      for (int k = 0; k < A::kStep; ++k) {
        x[k] = load(tangents_ + (key + k) * kWidth + lane);
        sum += x[k];
      }
      if constexpr (A::kStep > 1) A::store_step(weights_ + step_index<A>(key, lane, kWidth), x);
    }
    store(sums + lane, load(sums + lane) + sum);
  }

  const JvpParams& p_;
  std::int64_t head_stride_, value_stride_;
  Finiteness values_finite_;  // of a tile
  Element *keys_ = nullptr, *values_ = nullptr, *values_by_step_ = nullptr, *weights_ = nullptr;
  Element* query_[4] = {};
  Sum *tangents_ = nullptr, *reference_ = nullptr;
};

}  // namespace attnx::cpu::ATTNX_ISA
