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
  using Source = Storage<Input, A>;
  using Sequence = typename Source::Sequence;
  using Result = typename Source::Result;
  static constexpr int kWidth = kPanelLanes<Sum>;
  static_assert(kForwardKeys % kRowMultiple == 0 && kForwardKeys % A::kStep == 0);

 public:
  Forward(const ForwardParams& p, const Executor& executor)
      : p_(p),
        executor_(executor),
        head_stride_(round_up(p.head_dim, kRowMultiple)),
        value_stride_(round_up(p.value_dim, kRowMultiple)),
        rows_(tiling(larger(p.head_dim, p.value_dim) > 128 ? 2 : 4)) {
    // Few rows: smaller tiles, so that every thread gets some.
    while (rows_.panels > 1 && units() < 4 * executor.threads) rows_ = tiling(rows_.panels / 2);
  }

  std::int64_t workspace_bytes() const { return executor_.threads * worker_bytes(); }

  void run(char* workspace) const {
    std::int64_t next = 0;
    executor_.run([&](int worker) {
      Buffers buffers(*this, workspace + worker * worker_bytes());
      for (;;) {
        const std::int64_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (unit >= units()) return;
        // The last tiles of a causal head are the longest: they go first.
        const std::int64_t tile = tiles() - 1 - unit % tiles(), head = unit / tiles();
        const Sequence sequence(p_, head / head_groups());
        attend(sequence, sequence.first_head + head % head_groups() * rows_.group, tile * rows_.tile_rows, buffers);
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
      for (int i = 0; i < f.rows_.panels; ++i) {
        query[i] = arena.take<Element>(f.head_stride_ * kWidth);
        output[i] = arena.take<Sum>(f.value_stride_ * kWidth);
      }
      panels = arena.take<Panel<Sum>>(f.rows_.panels);
      scores = arena.take<typename Score::template Forward<A>>(f.rows_.panels);
      bytes = arena.used();
    }
  };

  RowTiling<Sum> tiling(std::int64_t panels) const { return {p_, Tiles::kListed, Source::kGathered, panels}; }
  std::int64_t worker_bytes() const { return Buffers(*this, nullptr).bytes; }
  // Of a sequence; a cluster is about one head.
  std::int64_t head_groups() const { return Source::kGathered ? 1 : p_.heads_q / rows_.group; }
  std::int64_t tiles() const { return (p_.length_q * rows_.group + rows_.tile_rows - 1) / rows_.tile_rows; }
  std::int64_t units() const { return Source::sequences(p_) * head_groups() * tiles(); }

  void attend(const Sequence& sequence, std::int64_t first_head, std::int64_t row0, Buffers& b) const {
    const std::int64_t end = smaller(sequence.length_q * rows_.group, row0 + rows_.tile_rows);
    if (row0 >= end) return;
    const Tiles tiles(p_, sequence, first_head, row0);
    const Source storage(p_, sequence, first_head / (p_.heads_q / p_.heads_k));

    int panels = 0;
    KeyRange any{sequence.length_k, 0};
    for (std::int64_t row = row0; row < end; row += rows_.panel_rows, ++panels) {
      Panel<Sum>& panel = b.panels[panels];
      panel.set(p_, sequence, tiles, first_head, rows_.group, row, smaller(end - row, rows_.panel_rows));
      any = {smaller(any.first, panel.any.first), larger(any.end, panel.any.end)};
      load_rows<A>(
          [&](std::int64_t i) {
            return row_of<const Input>(p_.query, sequence.batch, panel.head[i], sequence.query_row(panel.query[i]));
          },
          panel.rows, p_.head_dim, b.rows, head_stride_);
      transpose_rows<A>(b.rows, panel.rows, p_.head_dim, head_stride_, b.query[panels]);
      __builtin_memset(b.output[panels], 0, std::size_t(value_stride_ * kWidth) * sizeof(Sum));
      b.scores[panels].begin();
    }

    tiles.for_each(any, kForwardKeys, [&](const KeyTile& tile) {
      storage.load_keys(tile.first, tile.count, b.keys, head_stride_);
      storage.load_values(tile.first, tile.count, b.values, value_stride_);
      storage.prefetch(tile.next, kForwardKeys);
      if constexpr (A::kStep > 1)
        interleave_rows<A>(b.values, tile.count, value_stride_, b.values_by_step, value_stride_);
      for (int i = 0; i < panels; ++i) {
        const KeyRange seen = b.panels[i].any;
        if (seen.first < tile.first + tile.count && seen.end > tile.first) visit(b, i, tile);
      }
    });
    for (int i = 0; i < panels; ++i) finish(sequence, b.panels[i], b.scores[i], b.output[i]);
  }

  void visit(Buffers& b, int i, const KeyTile& tile) const {
    const Panel<Sum>& panel = b.panels[i];
    const std::int64_t key0 = tile.first, keys = tile.count, padded = round_up(keys, A::kStep),
                       steps = padded / A::kStep;
    gemm<A>({b.keys, head_stride_, A::kStep, b.query[i], kWidth * A::kStep, b.products, kWidth}, padded, panel.vectors,
            (p_.head_dim + A::kStep - 1) / A::kStep, false);
    const PanelOnTile<Sum> on_tile(panel, tile, padded);
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
      const std::int64_t head = panel.head[lane], row = s.result_row(panel.query[lane]);
      store_lane(output, lane, p_.value_dim, score.output_factor(panel, lane),
                 row_of<Result>(p_.output, s.batch, head, row));
      if constexpr (Score::kNormalised) *row_of<Sum>(p_.logsumexp, s.batch, head, row) = score.logsumexp(panel, lane);
    }
  }

  const ForwardParams& p_;
  const Executor& executor_;
  std::int64_t head_stride_, value_stride_;
  RowTiling<Sum> rows_;
};

}  // namespace attnx::cpu::ATTNX_ISA
