// The forward loop. For a tile of query rows: every tile of keys once, for each panel of the rows
//
//     S^T = K Q^T      weights = Score(S^T)      O^T += V^T weights
//
// with the query rows on the lanes (panel.h). Keys and values are loaded once for all panels of the tile.
#pragma once

#include "../executor.h"
#include "arena.h"
#include "gemm.h"
#include "rows.h"

namespace attnx::cpu::ATTNX_ISA {

inline constexpr std::int64_t kForwardKeys = 96;  // a tile; a multiple of kRowMultiple

template <class Input, class Score, class Tiles, template <class, class> class Storage>
class Forward {
  using A = Arithmetic<Input>;
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  static constexpr int kWidth = kPanelLanes<Sum>;
  static_assert(kForwardKeys % kRowMultiple == 0 && kForwardKeys % A::kStep == 0);

 public:
  Forward(const ForwardParams& p, const Executor& executor)
      : p_(p),
        executor_(executor),
        rows_(p.length_q * (p.heads_q / p.heads_k)),
        head_stride_(round_up(p.head_dim, kRowMultiple)),
        value_stride_(round_up(p.value_dim, kRowMultiple)),
        panels_(larger(p.head_dim, p.value_dim) > 128 ? 2 : 4) {
    // Few rows: smaller tiles, so that every thread gets some.
    while (panels_ > 1 && units() < 4 * executor.threads) panels_ /= 2;
  }

  std::int64_t worker_bytes() const { return Buffers(*this, nullptr).bytes; }

  void run(char* workspace) const {
    std::int64_t next = 0;
    executor_.run([&](int worker) {
      Buffers buffers(*this, workspace + worker * worker_bytes());
      for (;;) {
        const std::int64_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (unit >= units()) return;
        // The last tiles of a causal head are the longest: they go first.
        const std::int64_t tile = tiles() - 1 - unit % tiles(), head = unit / tiles();
        attend(head / p_.heads_k, head % p_.heads_k, tile * panels_ * kWidth, buffers);
      }
    });
  }

 private:
  struct Buffers {
    Element *keys, *values, *values_by_step, *rows, *weights;
    Element* query[4];
    Sum* products;
    Sum* output[4];
    Panel<Sum>* panels;
    typename Score::template Forward<A>* scores;
    std::int64_t bytes;

    Buffers(const Forward& f, char* block) {
      Arena arena(block);
      keys = arena.take<Element>(kForwardKeys * f.head_stride_);
      values = arena.take<Element>(kForwardKeys * f.value_stride_);
      values_by_step = A::kStep == 1 ? values : arena.take<Element>(kForwardKeys * f.value_stride_);
      rows = arena.take<Element>(kWidth * f.head_stride_);
      products = arena.take<Sum>(kForwardKeys * kWidth);
      // A product becomes a weight in its place where the types allow.
      weights = A::kStep == 1 ? reinterpret_cast<Element*>(products) : arena.take<Element>(kForwardKeys * kWidth);
      for (int i = 0; i < f.panels_; ++i) {
        query[i] = arena.take<Element>(f.head_stride_ * kWidth);
        output[i] = arena.take<Sum>(f.value_stride_ * kWidth);
      }
      panels = arena.take<Panel<Sum>>(f.panels_);
      scores = arena.take<typename Score::template Forward<A>>(f.panels_);
      bytes = arena.used();
    }
  };

  std::int64_t tiles() const { return (rows_ + panels_ * kWidth - 1) / (panels_ * kWidth); }
  std::int64_t units() const { return p_.batch * p_.heads_k * tiles(); }

  void attend(std::int64_t batch, std::int64_t key_head, std::int64_t row0, Buffers& b) const {
    const Sequence sequence(p_, batch);
    const std::int64_t rows = sequence.length_q * (p_.heads_q / p_.heads_k);
    if (row0 >= rows) return;
    const Tiles tiles(p_, sequence);
    const Storage<Input, A> storage(p_, sequence, key_head);

    int panels = 0;
    KeyRange any{sequence.length_k, 0};
    for (std::int64_t row = row0; row < rows && panels < panels_; row += kWidth, ++panels) {
      Panel<Sum>& panel = b.panels[panels];
      panel.set(p_, sequence, tiles, key_head, row, smaller<std::int64_t>(rows - row, kWidth));
      any = {smaller(any.first, panel.any.first), larger(any.end, panel.any.end)};
      load_rows<A>(
          [&](std::int64_t i) {
            return row_of<const Input>(p_.query, batch, panel.head[i], sequence.first_q + panel.query[i]);
          },
          panel.rows, p_.head_dim, b.rows, head_stride_);
      transpose_rows<A>(b.rows, panel.rows, p_.head_dim, head_stride_, b.query[panels]);
      __builtin_memset(b.output[panels], 0, std::size_t(value_stride_ * kWidth) * sizeof(Sum));
      b.scores[panels].begin();
    }

    tiles.for_each(any, kForwardKeys, [&](std::int64_t key0, std::int64_t keys) {
      storage.load_keys(key0, keys, b.keys, head_stride_);
      storage.load_values(key0, keys, b.values, value_stride_);
      storage.prefetch(key0 + keys, kForwardKeys);
      if constexpr (A::kStep > 1) interleave_rows<A>(b.values, keys, value_stride_, b.values_by_step, value_stride_);
      for (int i = 0; i < panels; ++i) {
        if (b.panels[i].any.first < key0 + keys && b.panels[i].any.end > key0) visit(b, i, key0, keys);
      }
    });
    for (int i = 0; i < panels; ++i) finish(sequence, b.panels[i], b.scores[i], b.output[i]);
  }

  void visit(Buffers& b, int i, std::int64_t key0, std::int64_t keys) const {
    const Panel<Sum>& panel = b.panels[i];
    const std::int64_t padded = round_up(keys, A::kStep), steps = padded / A::kStep;
    gemm<A>({b.keys, head_stride_, A::kStep, b.query[i], kWidth * A::kStep, b.products, kWidth}, padded, panel.vectors,
            (p_.head_dim + A::kStep - 1) / A::kStep, false);
    const PanelOnTile<Sum> on_tile(panel, key0, padded);
    b.scores[i].weigh(b.products, padded, Sum(p_.scale), panel, on_tile, b.weights, b.output[i], p_.value_dim);
    const GemmOperands<A> g{b.values_by_step, A::kStep, value_stride_ * A::kStep, b.weights, kWidth * A::kStep,
                            b.output[i],      kWidth};
    if (!on_tile.masked || all_finite(b.values, keys * value_stride_)) {
      gemm<A>(g, p_.value_dim, panel.vectors, steps, true);
    } else {
      gemm_where<A>(g, p_.value_dim, panel.rows, keys, [&](std::int64_t, std::int64_t lane, std::int64_t key) {
        return key0 + key >= panel.visible[lane].first && key0 + key < panel.visible[lane].end;
      });
    }
  }

  void finish(const Sequence& s, const Panel<Sum>& panel, const typename Score::template Forward<A>& score,
              const Sum* output) const {
    for (int lane = 0; lane < panel.rows; ++lane) {
      const std::int64_t head = panel.head[lane], row = s.first_q + panel.query[lane];
      store_lane(output, lane, p_.value_dim, score.output_factor(panel, lane),
                 row_of<Input>(p_.output, s.batch, head, row));
      if constexpr (Score::kNormalised) *row_of<Sum>(p_.logsumexp, s.batch, head, row) = score.logsumexp(panel, lane);
    }
  }

  const ForwardParams& p_;
  const Executor& executor_;
  std::int64_t rows_;  // of the longest sequence, for one key head
  std::int64_t head_stride_, value_stride_;
  std::int64_t panels_;  // of a tile of rows
};

}  // namespace attnx::cpu::ATTNX_ISA
