// Keys, and then features, on the vector lanes, a handful of query rows read by broadcast: for decoding, where rows
// would leave most lanes empty.
//
//     S[rows][keys] = Q K^T      weights = Score(S)      O[rows][features] += weights V
//
// Where keys lie as rows, S is made of sums over features on the lanes instead: to transpose the keys would cost more.
#pragma once

#include "../arena.h"
#include "../epilogue/output.h"
#include "../gemm.h"
#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

template <class A, class Score>
class KeysOnLanes {
  using Element = typename A::Element;
  using Sum = typename A::Sum;

 public:
  using Rows = OutputRows<Sum>;
  using Params = ForwardParams;

  // From here on rows fill as much of the lanes as keys would spare.
  static constexpr std::int64_t kMostRows = larger(kLanes<Sum> / 2, 1);
  static constexpr std::int64_t kKeys = 64;  // of a tile
  static_assert(kKeys % kLanes<Sum> == 0 && kKeys % A::kStep == 0);

  KeysOnLanes(const AttentionParams& p, std::int64_t /*panels*/, Arena& arena)
      : p_(p),
        head_stride_(round_up(p.head_dim, kLanes<Sum> * A::kStep)),
        value_stride_(round_up(p.value_dim, kLanes<Sum>)) {
    constexpr std::int64_t kRows = round_up(kMostRows, kFewRowMultiple);
    keys_ = arena.take<Element>(kKeys * head_stride_);
    values_ = arena.take<Element>(kKeys * value_stride_);
    rows_ = A::kStep == 1 ? values_ : arena.take<Element>(kKeys * value_stride_);
    query_ = arena.take<Element>(kRows * head_stride_);
    products_ = arena.take<Sum>(kRows * kKeys);
    weights_ = A::kStep == 1 ? reinterpret_cast<Element*>(products_) : arena.take<Element>(kRows * kKeys);
    output_ = arena.take<Sum>(kRows * value_stride_);
    scores_ = arena.take<typename Score::template Forward<A>>(1);
  }

  template <class Sequence, class RowsOf>
  void begin(int, const Panel<Sum>& panel, const Sequence& sequence, bool first_keys, const RowsOf& rows_of) {
    load_rows<A>(rows_of(p_.query), panel.rows, p_.head_dim, query_, head_stride_);
    // gemm reads these for rows that there are not.
    const std::int64_t padded = round_up(panel.rows, kFewRowMultiple);
    __builtin_memset(query_ + panel.rows * head_stride_, 0,
                     std::size_t((padded - panel.rows) * head_stride_) * sizeof(Element));
    __builtin_memset(products_, 0, std::size_t(padded * kKeys) * sizeof(Sum));
    __builtin_memset(weights_, 0, std::size_t(padded * kKeys) * sizeof(Element));
    __builtin_memset(output_, 0, std::size_t(padded * value_stride_) * sizeof(Sum));
    scores_[0].begin(p_, sequence, panel, first_keys);
  }

  template <class Storage>
  void load(const Storage& storage, const KeyTile& tile) {
    by_steps_ = Storage::kSteps;
    value_rows_ = values_, value_step_ = value_stride_ * A::kStep;
    if constexpr (Storage::kSteps) {
      storage.load_key_steps(tile.first, tile.count, keys_, kKeys);
      storage.load_value_steps(tile.first, tile.count, values_, value_stride_);
    } else {
      load_key_rows(storage, tile);
      if constexpr (A::kStep > 1) {
        storage.load_values(tile.first, tile.count, rows_, value_stride_);
        interleave_rows<A>(rows_, tile.count, value_stride_, values_, value_stride_);
      } else {
        if constexpr (__is_same(typename Storage::Number, Element)) {
          if (p_.value_dim == value_stride_) {
            value_rows_ = storage.value(tile.first), value_step_ = storage.value_stride();
            return;
          }
        }
        storage.load_values(tile.first, tile.count, values_, value_stride_);
      }
    }
  }

  void visit(int, const Panel<Sum>& panel, const KeyTile& tile) {
    const std::int64_t key0 = tile.first, steps = (tile.count + A::kStep - 1) / A::kStep,
                       padded = round_up(tile.count, kLanes<Sum>);
    const std::int64_t features = (p_.head_dim + A::kStep - 1) / A::kStep;
    if (by_steps_) {
      gemm_few_rows<A>({query_, head_stride_, A::kStep, keys_, kKeys * A::kStep, products_, kKeys}, panel.rows,
                       padded / kLanes<Sum>, features, false);
    } else {
      gemm_dots<A>(query_, head_stride_, key_rows_, products_, kKeys, panel.rows, padded, features);
    }
    const PanelOnTile<Sum> on_tile(panel, tile, padded);
    if constexpr (Score::kSkipsTiles) {
      bool any = false;
      for (int row = 0; row < panel.rows && !any; ++row)
        any = scores_[0].weighs_row(products_ + row * kKeys, padded, Sum(p_.scale), panel, on_tile, row);
      if (!any) return;
    }
    for (int row = 0; row < panel.rows; ++row)
      scores_[0].weigh_row(products_ + row * kKeys, padded, Sum(p_.scale), panel, on_tile, row, weights_ + row * kKeys,
                           output_ + row * value_stride_, p_.value_dim);
    const GemmOperands<A> g{weights_, kKeys, A::kStep, value_rows_, value_step_, output_, value_stride_};
    if (!on_tile.masked || values_finite(steps)) {
      gemm_few_rows<A>(g, panel.rows, value_stride_ / kLanes<Sum>, steps, true);
    } else {
      gemm_where<A>(g, panel.rows, p_.value_dim, tile.count, [&](std::int64_t row, std::int64_t, std::int64_t key) {
        return key0 + key >= panel.visible[row].first && key0 + key < panel.visible[row].end;
      });
    }
  }

  template <class Row>
  void finish(int, const Panel<Sum>& panel, int row, const Row& to) const {
    const Sum factor = scores_[0].output_factor(panel, row);
    Sum* const sums = output_ + row * value_stride_;
    for (std::int64_t d = 0; d < p_.value_dim; ++d) sums[d] *= factor;
    convert_row(to.output, sums, p_.value_dim);
    if constexpr (Score::kNormalised) *to.logsumexp = scores_[0].logsumexp(panel, row);
  }

 private:
  // Rows are read where they lie, where that is possible: each is used only a few times.
  template <class Storage>
  void load_key_rows(const Storage& storage, const KeyTile& tile) {
    const std::int64_t padded = round_up(tile.count, kLanes<Sum>);
    if constexpr (__is_same(typename Storage::Number, Element)) {
      if (p_.head_dim % (kLanes<Sum> * A::kStep) == 0) {
        for (std::int64_t i = 0; i < padded; ++i)  // the last one stands for those that there are not
          key_rows_[i] = storage.key(tile.first + smaller(i, tile.count - 1));
        return;
      }
    }
    storage.load_keys(tile.first, tile.count, keys_, head_stride_);
    for (std::int64_t i = 0; i < padded; ++i) key_rows_[i] = keys_ + smaller(i, tile.count - 1) * head_stride_;
  }

  bool values_finite(std::int64_t steps) const {
    bool finite = true;
    for (std::int64_t i = 0; i < steps; ++i)
      finite &= all_finite(value_rows_ + i * value_step_, value_stride_ * A::kStep);
    return finite;
  }

  const AttentionParams& p_;
  std::int64_t head_stride_, value_stride_;
  bool by_steps_ = false;  // keys_ is a B operand; else key_rows_ are the keys
  const Element* key_rows_[kKeys];
  const Element* value_rows_ = nullptr;  // as a B operand
  std::int64_t value_step_ = 0;
  Element *keys_, *values_, *rows_, *query_, *weights_;
  Sum *products_, *output_;
  typename Score::template Forward<A>* scores_;
};

}  // namespace attnx::cpu::ATTNX_ISA
