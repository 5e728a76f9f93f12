// The forward loop. For a tile of query rows: every tile of keys once, for each panel of the rows
//
//     S = Q K^T      weights = Score(S)      O += weights V
//
// laid out as Lanes says. Keys and values are loaded once for all panels of the tile. Where there are too few tiles of
// rows for the threads, the keys are cut into parts, whose rows are merged in the end; and where few rows see very
// many keys, so that each sum is one of shorter ones.
#pragma once

#include "../executor.h"
#include "arena.h"
#include "panel.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input, class Score, class Tiles, template <class, class> class Storage,
          template <class, class> class Lanes>
class Forward {
  using A = Arithmetic<Input>;
  using Sum = typename A::Sum;
  using Source = Storage<Input, A>;
  using Sequence = typename Source::Sequence;
  using Result = typename Source::Result;
  using Work = Lanes<A, Score>;
  using Rows = typename Work::Rows;
  using Params = typename Rows::Params;
  static constexpr std::int64_t kPartKeys = 1024;  // the least of a part
  // The most of a part where rows are few, so that their outputs over many parts take little memory. Every addition to
  // a sum of n equal terms is rounded in the same direction for a while, by up to n / 2 units of a term's last place.
  static constexpr std::int64_t kMostPartKeys = 65536, kFewRows = 192;

 public:
  Forward(const Params& p, const Executor& executor)
      : p_(p), executor_(executor), rows_(tiling(larger(p.head_dim, p.value_dim) > 128 ? 2 : 4)) {
    // Few rows: smaller tiles, so that every thread gets some.
    const std::int64_t wanted = 4 * executor.threads;
    while (rows_.panels > 1 && units() < wanted) rows_ = tiling(rows_.panels / 2);
    if (Tiles::kListed || Source::kGathered || units() == 0) return;
    if (rows_.panels == 1 && executor.threads > 1)
      parts_ = smaller((wanted + units() - 1) / units(), larger<std::int64_t>(p.length_k / kPartKeys, 1));
    if (p.length_q * rows_.group <= kFewRows) parts_ = larger(parts_, (p.length_k + kMostPartKeys - 1) / kMostPartKeys);
    part_keys_ = round_up((p.length_k + parts_ - 1) / parts_, Work::kKeys);
  }

  std::int64_t workspace_bytes() const { return executor_.threads * worker_bytes() + partial_bytes(); }

  void run(char* workspace) const {
    std::int64_t next = 0;
    Sum* const partial = reinterpret_cast<Sum*>(workspace + executor_.threads * worker_bytes());
    executor_.run([&](int worker) {
      Buffers buffers(*this, workspace + worker * worker_bytes());
      for (;;) {
        const std::int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (i >= units() * parts_) return;
        attend(unit(i / parts_), i % parts_, partial + i * partial_size(), buffers);
      }
    });
    if (parts_ == 1) return;
    for (std::int64_t i = 0; i < units(); ++i) merge(unit(i), partial + i * parts_ * partial_size());
  }

 private:
  struct Buffers {
    Arena arena;
    Work work;
    Panel<Sum>* panels;

    Buffers(const Forward& f, char* block)
        : arena(block), work(f.p_, f.rows_.panels, arena), panels(arena.take<Panel<Sum>>(f.rows_.panels)) {}
  };

  // A tile of rows of the heads of a group. Heads are counted from the sequence's first.
  struct Unit {
    std::int64_t sequence, head, row0;
  };

  RowTiling<Sum> tiling(std::int64_t panels) const { return {p_, Tiles::kListed, Source::kGathered, panels}; }
  std::int64_t worker_bytes() const { return Buffers(*this, nullptr).arena.used(); }
  // What the rows of a unit leave over one part of the keys.
  std::int64_t partial_rows() const { return smaller(rows_.tile_rows, p_.length_q * rows_.group); }
  std::int64_t partial_size() const { return partial_rows() * Rows::numbers(p_); }
  std::int64_t partial_bytes() const {
    return parts_ > 1 ? units() * parts_ * partial_size() * std::int64_t(sizeof(Sum)) : 0;
  }

  auto part_row(Sum* partial, std::int64_t lane) const { return Rows::of_part(p_, partial + lane * Rows::numbers(p_)); }

  // Of a sequence; a cluster is about one head.
  std::int64_t head_groups() const { return Source::kGathered ? 1 : p_.heads_q / rows_.group; }
  std::int64_t tiles() const { return (p_.length_q * rows_.group + rows_.tile_rows - 1) / rows_.tile_rows; }
  std::int64_t units() const { return Source::sequences(p_) * head_groups() * tiles(); }

  // The last tiles of a causal head are the longest: they go first.
  Unit unit(std::int64_t i) const {
    const std::int64_t head = i / tiles();
    return {head / head_groups(), head % head_groups() * rows_.group, (tiles() - 1 - i % tiles()) * rows_.tile_rows};
  }
  std::int64_t end_of(const Unit& u, const Sequence& s) const {
    return smaller(s.length_q * rows_.group, u.row0 + rows_.tile_rows);
  }

  void attend(const Unit& u, std::int64_t part, Sum* partial, Buffers& b) const {
    const Sequence sequence(p_, u.sequence);
    const std::int64_t first_head = sequence.first_head + u.head, end = end_of(u, sequence);
    if (u.row0 >= end) return;
    const Tiles tiles(p_, sequence, first_head, u.row0);
    const Source storage(p_, sequence, first_head / (p_.heads_q / p_.heads_k));

    int panels = 0;
    KeyRange any{sequence.length_k, 0};
    for (std::int64_t row = u.row0; row < end; row += rows_.panel_rows, ++panels) {
      Panel<Sum>& panel = b.panels[panels];
      panel.set(p_, sequence, tiles, first_head, rows_.group, row, smaller(end - row, rows_.panel_rows));
      if (parts_ > 1) panel.clip(keys_of(part, sequence));
      any = {smaller(any.first, panel.any.first), larger(any.end, panel.any.end)};
      b.work.begin(panels, panel, sequence, part == 0, [&](const Tensor& x) {
        return [&](std::int64_t i) {
          return row_of<const Input>(x, sequence.batch, panel.head[i], sequence.query_row(panel.query[i]));
        };
      });
    }

    tiles.for_each(any, Work::kKeys, [&](const KeyTile& tile) {
      b.work.load(storage, tile);
      storage.prefetch(tile.next, Work::kKeys);
      for (int i = 0; i < panels; ++i) {
        const KeyRange seen = b.panels[i].any;
        if (seen.first < tile.first + tile.count && seen.end > tile.first) b.work.visit(i, b.panels[i], tile);
      }
    });

    for (int i = 0; i < panels; ++i) {
      const Panel<Sum>& panel = b.panels[i];
      for (int lane = 0; lane < panel.rows; ++lane) {
        if (parts_ > 1) {
          b.work.finish(i, panel, lane, part_row(partial, lane));
        } else {
          const std::int64_t head = panel.head[lane], row = sequence.result_row(panel.query[lane]);
          b.work.finish(i, panel, lane, Rows::template of<Result>(p_, sequence.batch, head, row));
        }
      }
    }
  }

  KeyRange keys_of(std::int64_t part, const Sequence& s) const {
    return {smaller(part * part_keys_, s.length_k), smaller((part + 1) * part_keys_, s.length_k)};
  }

  void merge(const Unit& u, Sum* partial) const {
    const Sequence sequence(p_, u.sequence);
    const std::int64_t rows = end_of(u, sequence) - u.row0;
    for (std::int64_t lane = 0; lane < rows; ++lane) {
      const std::int64_t head = sequence.first_head + u.head + (u.row0 + lane) % rows_.group,
                         row = sequence.result_row((u.row0 + lane) / rows_.group);
      Rows::template merge<Score>(
          p_, parts_, [&](std::int64_t part) { return part_row(partial + part * partial_size(), lane); },
          Rows::template of<Result>(p_, sequence.batch, head, row));
    }
  }

  const Params& p_;
  const Executor& executor_;
  RowTiling<Sum> rows_;
  std::int64_t parts_ = 1, part_keys_ = 0;
};

}  // namespace attnx::cpu::ATTNX_ISA
