// The backward loop. For a tile of query rows: every tile of keys once, for each panel of the rows
//
//     S^T = K Q^T    dP^T = V dO^T    P, dS = Score'(S, dP)    dV += P^T dO    dK += dS^T Q    dQ^T += K^T dS^T
//
// The weights are computed again from queries and keys; nothing of size length_q x length_k is kept. A unit of work
// owns its query rows and with them dQ. dK and dV are summed in float32 over the whole length of the keys, one such
// sum a worker; where there are fewer heads than threads the query tiles of a head are dealt to several units, whose
// sums are added up at the end in a fixed order. A cluster that is a large part of its head is worked at in turns. So
// results do not depend on who ran first.
#pragma once

#include "backward/sums.h"
#include "backward/tile.h"
#include "backward/turns.h"
#include "logits/plain.h"
#include "logits/sums.h"
#include "units.h"

namespace attnx::cpu::ATTNX_ISA {

inline constexpr std::int64_t kBackwardKeys = 96;  // a tile; a multiple of kRowMultiple

template <class Input, class Score, class Tiles, template <class, class> class Storage, class Logits = PlainLogits>
class Backward {
  using A = Arithmetic<Input>;
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  using Source = Storage<Input, A>;
  using Sequence = typename Source::Sequence;
  using Result = typename Source::Result;
  using Sizes = BackwardSizes<Sum>;
  using Sums = BackwardSums<Sum, Logits>;
  using Rows = BackwardRows<A, Score>;
  using Buffers = BackwardBuffers<A, Score, Logits>;
  using Work = BackwardTile<A, Score, Logits, Source::kGathered>;
  static constexpr int kWidth = kPanelLanes<Sum>;
  static constexpr std::int64_t kBlock = 12 * kBackwardKeys;  // of a turn: rows, and keys
  static_assert(kBackwardKeys % kRowMultiple == 0 && kBackwardKeys % A::kStep == 0);

 public:
  Backward(const BackwardParams& p, const Executor& executor)
      : p_(p),
        executor_(executor),
        rows_(p, Tiles::kListed, Source::kGathered, larger(p.head_dim, p.value_dim) > 128 ? 1 : Buffers::kMaxPanels),
        sizes_(p, tile_keys(p), rows_.panels, Source::kGathered ? 0 : p.length_k) {
    if (Source::kGathered) return;
    if constexpr (Logits::kHasTerms) {
      sizes_.sums_added = sums_added(p);
      sizes_.sums_shares = sums_shares(p);
      if (sums_distances(p)) sizes_.distances = distances(p);
      // The rows of a key's table belong to one unit, which adds to them directly.
      if (p.grad_key_table.data) return;
      if (heads_share_rows(p)) {
        splits_ = executor.threads;
        return;
      }
    }
    const std::int64_t heads = units();
    while (splits_ < executor.threads && !keeps_busy(heads * splits_, executor.threads)) ++splits_;
  }

  std::int64_t workspace_bytes() const {
    std::int64_t bytes = executor_.threads * worker_bytes() + unit_sums() * sums_bytes();
    if constexpr (Logits::kHasTerms) bytes += AllTermSums(p_, nullptr).bytes;
    return bytes;
  }

  void run(char* workspace) const {
    if constexpr (Logits::kHasTerms) {
      heads_share_rows(p_) ? run_head_by_head(workspace) : run_units(workspace);
      store_term_gradients<Sum, Sequence>(p_, executor_, all_term_sums(workspace));
    } else {
      run_units(workspace);
    }
  }

 private:
  // A cluster's sums stay its own: each worker keeps but those of its heads.
  std::int64_t unit_sums() const {
    if (heads_in_order()) return splits_;
    return splits_ == 1 ? executor_.threads : units();
  }

  void run_units(char* workspace) const {
    char* const all_sums = workspace + executor_.threads * worker_bytes();
    std::int64_t next = 0;
    executor_.run([&](int worker) {
      Buffers buffers(p_, sizes_, workspace + worker * worker_bytes());
      for (;;) {
        const std::int64_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (unit >= units()) return;
        if (blocks_of(unit) > 0) continue;
        char* const sums = all_sums + (splits_ == 1 ? worker : unit) * sums_bytes();
        differentiate(unit / splits_, unit % splits_, sums, buffers);
        if constexpr (!Source::kGathered)
          if (splits_ == 1) store(unit, 1, 0, sums, workspace);
      }
    });
    if constexpr (Source::kGathered) {
      for_each_turn(
          executor_, units(), [&](std::int64_t unit) { return blocks_of(unit); },
          [&](int worker, std::int64_t unit, std::int64_t block, std::int64_t turn) {
            Buffers buffers(p_, sizes_, workspace + worker * worker_bytes());
            differentiate_block(unit, block, turn, all_sums + worker * sums_bytes(), buffers);
          });
    } else {
      if (splits_ == 1) return;
      for_each_unit(executor_, units(), nullptr, 0, [&](std::int64_t unit, char*) {
        const std::int64_t head = unit / splits_;
        store(head, splits_, unit % splits_, all_sums + head * splits_ * sums_bytes(), workspace);
      });
    }
  }

  // Heads that add to the same rows of a mask's gradient do so one after another, each on all threads.
  bool heads_in_order() const {
    if constexpr (Logits::kHasTerms) return heads_share_rows(p_);
    return false;
  }
  void run_head_by_head(char* workspace) const {
    char* const all_sums = workspace + executor_.threads * worker_bytes();
    for (std::int64_t head = 0; head < units() / splits_; ++head) {
      for_each_unit(executor_, splits_, workspace, worker_bytes(), [&](std::int64_t split, char* memory) {
        Buffers buffers(p_, sizes_, memory);
        differentiate(head, split, all_sums + split * sums_bytes(), buffers);
      });
      for_each_unit(executor_, splits_, nullptr, 0,
                    [&](std::int64_t part, char*) { store(head, splits_, part, all_sums, workspace); });
    }
  }

  void store(std::int64_t head, std::int64_t splits, std::int64_t part, char* sums, char* workspace) const {
    store_sums<Input, Logits>(p_, sizes_, head, splits, part, sums);
    if constexpr (Logits::kHasTerms) {
      const Sequence s(p_, head / p_.heads_k);
      const auto of_split = [&](std::int64_t split) { return Sums(sizes_, sums + split * sums_bytes()).terms; };
      add_up_terms(p_, s.batch, head % p_.heads_k, s.length_k, splits, part, of_split, all_term_sums(workspace));
    }
  }
  auto all_term_sums(char* workspace) const {
    return AllTermSums(p_, workspace + executor_.threads * worker_bytes() + unit_sums() * sums_bytes());
  }

  // Rows of one head, the keys that they meet here, and whether they met others before.
  struct RowsAndKeys {
    std::int64_t head, first, end;
    KeyRange keys;
    bool adds;
  };

  // Of a tile. Clusters that are not long have all of theirs in one.
  static std::int64_t tile_keys(const BackwardParams& p) {
    constexpr std::int64_t kMostAtOnce = 2 * kBackwardKeys;
    if (!Source::kGathered || p.length_k > kMostAtOnce) return kBackwardKeys;
    return round_up(larger<std::int64_t>(p.length_k, 1), kRowMultiple);
  }
  bool needs_output_of_cluster() const { return Source::kGathered && Score::kNormalised && !p_.output.data; }
  // It tells whether rows need sums over all of their keys before the first gradient.
  bool needs_products() const { return Score::kSumsProducts || needs_output_of_cluster(); }
  std::int64_t worker_bytes() const { return Buffers(p_, sizes_, nullptr).bytes; }
  std::int64_t sums_bytes() const { return Sums(sizes_, nullptr).bytes; }
  // Key heads of a sequence, and query heads of one of them; a cluster is about one head.
  std::int64_t key_heads() const { return Source::kGathered ? 1 : p_.heads_k; }
  std::int64_t query_heads() const { return Source::kGathered ? 1 : sizes_.group; }
  std::int64_t units() const { return Source::sequences(p_) * key_heads() * splits_; }

  // Into how many blocks the rows and keys of a cluster are cut which is a large part of its head. This does not ask
  // for the threads, so that results are the same for any number of them.
  std::int64_t blocks_of(std::int64_t unit) const {
    if constexpr (Source::kGathered) {
      const Sequence s(p_, unit);
      const std::int64_t shorter = smaller(s.length_q, s.length_k), longer = larger(s.length_q, s.length_k);
      if (shorter <= kBlock || s.length_q * 8 < p_.gather->queries.slots || needs_output_of_cluster()) return 0;
      return (longer + kBlock - 1) / kBlock;
    }
    return 0;
  }

  void differentiate(std::int64_t unit, std::int64_t split, char* memory, Buffers& b) const {
    const Sequence sequence(p_, unit / key_heads());
    const std::int64_t key_head = sequence.first_head / sizes_.group + unit % key_heads();
    const std::int64_t head0 = Source::kGathered ? sequence.first_head : key_head * sizes_.group;
    const Source storage(p_, sequence, key_head);
    const KeyRange keys{0, sequence.length_k};
    if constexpr (Source::kGathered) storage.prefetch(0, sizes_.tile_keys);
    const Sums sums = begin_sums(sequence, keys, memory);
    // A split takes every splits_-th tile of the rows of the key head's query heads. Tiles that share a list stay
    // together, as they add to the gradients of its biases.
    const std::int64_t rows = sequence.length_q * rows_.group, part = Tiles::kListed ? p_.block_q : rows_.tile_rows;
    const std::int64_t parts = (rows + part - 1) / part;
    const bool in_order = heads_in_order();  // then a split takes the same rows of all heads
    const std::int64_t all = parts * (query_heads() / rows_.group), step = in_order ? 1 : splits_;
    for (std::int64_t i = in_order ? 0 : split; i < all; i += step) {
      if (in_order && i % parts % splits_ != split) continue;
      const std::int64_t first_head = head0 + i / parts * rows_.group, end = smaller(rows, (i % parts + 1) * part);
      for (std::int64_t row = i % parts * part; row < end; row += rows_.tile_rows)
        differentiate_rows(sequence, storage, {first_head, row, smaller(end, row + rows_.tile_rows), keys, false}, sums,
                           b);
    }
  }

  // Does one turn of a block of a cluster's rows.
  void differentiate_block(std::int64_t unit, std::int64_t block, std::int64_t turn, char* memory, Buffers& b) const {
    const Sequence sequence(p_, unit);
    const Source storage(p_, sequence, sequence.first_head / sizes_.group);
    const auto of = [](std::int64_t i, std::int64_t length) {
      return KeyRange{smaller(i * kBlock, length), smaller((i + 1) * kBlock, length)};
    };
    const KeyRange rows = of(block, sequence.length_q);
    const KeyRange keys = of((block + turn) % blocks_of(unit), sequence.length_k);
    const Sums sums = begin_sums(sequence, turn == 0 ? keys : KeyRange{0, 0}, memory);
    // The last row sees the most.
    const Tiles tiles(p_, sequence, sequence.first_head, rows.first);
    if (turn > 0 && tiles.row(rows.end - 1 + sequence.length_k - sequence.length_q).end <= keys.first) return;
    for (std::int64_t row = rows.first; row < rows.end; row += rows_.tile_rows) {
      const std::int64_t end = smaller(rows.end, row + rows_.tile_rows);
      differentiate_rows(sequence, storage, {sequence.first_head, row, end, keys, turn > 0}, sums, b);
    }
  }

  // The sums of a unit, with those of these keys at zero.
  Sums begin_sums(const Sequence& sequence, KeyRange keys, char* memory) const {
    Sums sums(sizes_, memory);
    __builtin_memset(memory, 0, std::size_t(sums.bytes));
    if constexpr (Source::kGathered) {
      sums.grad_key = static_cast<Sum*>(p_.key_sums) + sequence.first_key_sum * sizes_.head_lanes;
      sums.grad_value = static_cast<Sum*>(p_.value_sums) + sequence.first_key_sum * sizes_.value_lanes;
      set_zero(sums.grad_key + keys.first * sizes_.head_lanes, (keys.end - keys.first) * sizes_.head_lanes);
      set_zero(sums.grad_value + keys.first * sizes_.value_lanes, (keys.end - keys.first) * sizes_.value_lanes);
    }
    return sums;
  }

  void differentiate_rows(const Sequence& sequence, const Source& storage, const RowsAndKeys& x, const Sums& sums,
                          Buffers& b) const {
    const Tiles tiles(p_, sequence, x.head, x.first);
    const Work work(p_, sizes_);
    const bool some_keys = x.keys.end - x.keys.first < sequence.length_k;
    int panels = 0;
    KeyRange any{sequence.length_k, 0};
    for (std::int64_t row = x.first; row < x.end; row += rows_.panel_rows, ++panels) {
      Rows& r = b.panel[panels];
      r.panel->set(p_, sequence, tiles, x.head, rows_.group, row, smaller(x.end - row, rows_.panel_rows));
      if (some_keys) r.panel->clip(x.keys);
      any = {smaller(any.first, r.panel->any.first), larger(any.end, r.panel->any.end)};
      begin(sequence, r, b.rows);
      b.logits.begin(panels, *r.panel, sequence);
    }
    const auto for_each_tile = [&](auto visit) {
      tiles.for_each(any, sizes_.tile_keys, [&](const KeyTile& tile) {
        b.logits.set_tile(tile);
        b.keys_finite.forget();
        storage.load_keys(tile.first, tile.count, b.keys, sizes_.head_stride);
        storage.load_values(tile.first, tile.count, b.values, sizes_.value_stride);
        storage.prefetch(tile.next, sizes_.tile_keys);
        if constexpr (A::kStep > 1)
          interleave_rows<A>(b.keys, tile.count, sizes_.head_stride, b.keys_by_step, sizes_.head_stride);
        for (int i = 0; i < panels; ++i) {
          const KeyRange seen = b.panel[i].panel->any;
          if (seen.first < tile.first + tile.count && seen.end > tile.first) visit(b.panel[i], tile);
        }
      });
    };
    // The output of one cluster alone is not kept, and some scores have sums of their own. What rows need of it comes
    // from the products of one tile, or else from those of all, which are then made twice.
    const bool needs_sums = needs_products(), at_once = any.end <= sizes_.tile_keys;
    if (needs_sums && !at_once) {
      for_each_tile([&](Rows& r, const KeyTile& tile) {
        const std::int64_t padded = round_up(tile.count, A::kStep);
        work.multiply(b, r, padded);
        work.add_products(b, r, PanelOnTile<Sum>(*r.panel, tile, padded), padded);
      });
    }
    for_each_tile([&](Rows& r, const KeyTile& tile) {
      work.visit(sums, b, r, tile, needs_sums && at_once);
      if constexpr (Tiles::kListed)
        if (p_.grad_block_bias) r.move_grad_bias(bias_of_block(sequence.batch, x.head, x.first, tile.place));
    });
    for (int i = 0; i < panels; ++i) store_rows(sequence, sums, b.panel[i], x.adds);
  }

  double& bias_of_block(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t place) const {
    const std::int64_t blocks = (p_.length_q + p_.block_q - 1) / p_.block_q;
    const std::int64_t list = (batch * p_.heads_q + head) * blocks + row / p_.block_q;
    return p_.grad_block_bias[list * p_.key_blocks.width + place];
  }

  void begin(const Sequence& s, Rows& r, Element* rows) const {
    const Panel<Sum>& panel = *r.panel;
    const auto fetch = [&](const Tensor& from, std::int64_t dim, std::int64_t stride, std::int64_t lanes,
                           Element* transposed, Element* by_step) {
      // Steps of one row are these rows.
      Element* const to = A::kStep == 1 ? by_step : rows;
      if constexpr (A::kStep == 1) stride = lanes;
      load_rows<A>(
          [&](std::int64_t i) {
            return row_of<const Input>(from, s.batch, panel.head[i], s.query_row(panel.query[i]));
          },
          panel.rows, dim, to, stride);
      // A mean over several clusters gives each its share of the gradient.
      if constexpr (Source::kGathered)
        if (&from == &p_.grad_output)
          for (std::int64_t i = 0; i < panel.rows; ++i) s.take_share(panel.query[i], to + i * stride, dim);
      transpose_rows<A>(to, panel.rows, dim, stride, transposed);
      if constexpr (A::kStep > 1) interleave_rows<A>(to, panel.rows, stride, by_step, lanes);
    };
    fetch(p_.query, p_.head_dim, sizes_.head_stride, sizes_.head_lanes, r.query, r.query_rows);
    fetch(p_.grad_output, p_.value_dim, sizes_.value_stride, sizes_.value_lanes, r.grad, r.grad_rows);
    r.query_finite.forget();
    r.grad_finite.forget();
    __builtin_memset(r.grad_query, 0, std::size_t(sizes_.head_stride * kWidth) * sizeof(Sum));
    __builtin_memset(r.grad_bias, 0, kWidth * sizeof(double));
    __builtin_memset(r.grad_slope, 0, kWidth * sizeof(double));
    r.score->template begin<Input>(p_, s, panel);
  }

  void store_rows(const Sequence& s, const Sums& sums, const Rows& r, bool adds) const {
    Sum rows[kLanes<Sum>][kMaxHeadDim];
    for (int lane = 0; lane < r.panel->rows; ++lane) {
      if (lane % kLanes<Sum> == 0) transpose_columns(r.grad_query + lane, p_.head_dim, rows[0], kMaxHeadDim);
      const std::int64_t head = r.panel->head[lane];
      const std::int64_t row = s.result_row(r.panel->query[lane]);
      Sum* const sum = rows[lane % kLanes<Sum>];
      for (std::int64_t d = 0; d < p_.head_dim; ++d) sum[d] *= Sum(p_.scale);
      add_row(p_.grad_query_addend, s.batch, head, row, p_.head_dim, sum);
      if constexpr (Source::kGathered)
        if (adds) add_row(p_.grad_query, s.batch, head, row, p_.head_dim, sum);
      convert_row(row_of<Result>(p_.grad_query, s.batch, head, row), sum, p_.head_dim);
      sums.grad_bias[head % sizes_.group] += r.grad_bias[lane];
      sums.grad_slope[head % sizes_.group] += r.grad_slope[lane];
      if constexpr (Score::kHasSink)
        if (p_.grad_sink) sums.grad_sink[head % sizes_.group] += r.score->grad_sink(p_, *r.panel, lane);
    }
  }

  const BackwardParams& p_;
  const Executor& executor_;
  RowTiling<Sum> rows_;
  Sizes sizes_;
  std::int64_t splits_ = 1;  // of a head's query tiles
};

}  // namespace attnx::cpu::ATTNX_ISA
