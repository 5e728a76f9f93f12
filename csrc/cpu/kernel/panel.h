// A panel: the query rows that fill the vectors of one matrix product, and what every lane needs to know of its row.
//
// Rows of a key head are numbered (query i, head g of the group), g fastest: the query heads that share a key head
// sit in one panel and read its keys once. Everything that depends on the row - bias, slope, mask, maximum - is a
// vector; nothing in the loop is summed across lanes.
#pragma once

#include "arithmetic.h"
#include "attnx/params.h"

namespace attnx::cpu::ATTNX_ISA {

inline constexpr int kPanelVectors = 3;
template <class Sum>
inline constexpr int kPanelLanes = kPanelVectors * kLanes<Sum>;

// One sequence of the batch: where its rows start, and how many there are.
struct Sequence {
  std::int64_t batch, first_q, first_k, length_q, length_k;
  static constexpr std::int64_t first_head = 0;  // of those that it is about

  Sequence(const AttentionParams& p, std::int64_t b)
      : batch(b), first_q(0), first_k(0), length_q(p.length_q), length_k(p.length_k) {
    if (p.cu_seqlens_q) first_q = p.cu_seqlens_q[b], length_q = p.cu_seqlens_q[b + 1] - first_q;
    if (p.key_ends) first_k = p.key_starts[b], length_k = p.key_ends[b] - first_k;
    if (p.cache) length_k = p.cache->of(b).length();
    if (p.query_lengths) length_q = p.query_lengths[b];
  }

  // The row of a query in the tensors of the user, and where results of the loop go.
  std::int64_t query_row(std::int64_t i) const { return first_q + i; }
  std::int64_t result_row(std::int64_t i) const { return first_q + i; }
};

struct KeyRange {
  std::int64_t first, end;
};

// Keys that are loaded together, and what a list of blocks says of them.
struct KeyTile {
  std::int64_t first, count;
  std::int64_t next;       // the first key of the tile that probably follows
  float bias = 0;          // added to the logits
  float divisor = 1;       // of the weights
  std::int64_t place = 0;  // of its block in the list
};

template <class T>
ATTNX_INLINE T* row_of(const Tensor& t, std::int64_t batch, std::int64_t head, std::int64_t row) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + head * t.head_stride + row * t.row_stride;
}

template <class Sum>
struct Panel {
  static constexpr int kCount = kPanelLanes<Sum>;

  int rows;     // real ones; the lanes after them repeat the last, and are dropped at the end
  int vectors;  // enough for the rows
  std::int64_t query[kCount];
  std::int64_t head[kCount];
  KeyRange visible[kCount];
  KeyRange any, all;              // keys that some row sees, that every row sees
  std::int64_t position[kCount];  // of the key that stands where the query stands
  alignas(kVectorBytes) Sum bias[kCount];
  alignas(kVectorBytes) Sum slope[kCount];
  bool alibi;

  // Rows row0 .. row0 + count - 1 of `group` query heads, from the given one on.
  template <class Tiles, class Sequence>
  void set(const AttentionParams& p, const Sequence& s, const Tiles& tiles, std::int64_t first_head, std::int64_t group,
           std::int64_t row0, std::int64_t count) {
    rows = int(count);
    vectors = (rows + kLanes<Sum> - 1) / kLanes<Sum>;
    alibi = p.alibi_slopes.data != nullptr;
    std::int64_t of_group = row0 % group, q = row0 / group;
    for (int lane = 0; lane < kCount; ++lane) {
      query[lane] = q;
      head[lane] = first_head + of_group;
      if (lane + 1 < rows && ++of_group == group) of_group = 0, ++q;
      position[lane] = query[lane] + s.length_k - s.length_q + p.position_offset;
      visible[lane] = bounded(p.row_bounds, s.batch, lane, tiles.row(position[lane]));
      if (lane == 0) any = all = visible[0];
      any = {smaller(any.first, visible[lane].first), larger(any.end, visible[lane].end)};
      all = {larger(all.first, visible[lane].first), smaller(all.end, visible[lane].end)};
      bias[lane] = Sum(p.bias_value) + per_head(p.bias, head[lane]);
      if (p.bias_rule == BiasRule::kLength) bias[lane] -= log(s.length_k);
      if (p.bias_rule == BiasRule::kRow) bias[lane] -= log(tiles.keys_in_band(position[lane]));
      slope[lane] = per_head(p.alibi_slopes, head[lane]);
    }
  }

  static Sum per_head(const PerHead& x, std::int64_t head, Sum absent = 0) {
    return x.data ? static_cast<const Sum*>(x.data)[head * x.stride] : absent;
  }

  // How many of a tile's keys, in whole steps, lie before the last one that some row sees: under a causal mask the
  // others cost nothing.
  std::int64_t keys_seen(const KeyTile& tile, std::int64_t step) const {
    return smaller(tile.count, round_up(any.end - tile.first, step));
  }

  // Drops what lies outside of a part of the keys from what the rows see.
  void clip(KeyRange part) {
    any = {part.end, part.first}, all = part;
    for (int lane = 0; lane < kCount; ++lane) {
      KeyRange& seen = visible[lane];
      seen.first = smaller(larger(seen.first, part.first), part.end);
      seen.end = larger(seen.first, smaller(seen.end, part.end));
      any = {smaller(any.first, seen.first), larger(any.end, seen.end)};
      all = {larger(all.first, seen.first), smaller(all.end, seen.end)};
    }
  }

 private:
  // This returns what the bounds of a row leave of the keys that it sees.
  KeyRange bounded(const RowBounds& bounds, std::int64_t batch, int lane, KeyRange seen) const {
    if (!bounds.data) return seen;
    const std::int32_t* const row =
        bounds.data + batch * bounds.batch_stride + head[lane] * bounds.head_stride + query[lane] * bounds.row_stride;
    const std::int64_t first = smaller(larger<std::int64_t>(row[0], seen.first), seen.end);
    return {first, larger(first, smaller<std::int64_t>(row[1], seen.end))};
  }

  static Sum log(std::int64_t keys) { return Sum(__builtin_log(double(larger<std::int64_t>(keys, 1)))); }
};

// The panel as seen from one tile of keys: positions count from the tile's first key.
template <class Sum>
struct PanelOnTile {
  alignas(kVectorBytes) Sum position[kPanelLanes<Sum>];
  alignas(kVectorBytes) MaskInt<Sum> first[kPanelLanes<Sum>], end[kPanelLanes<Sum>];
  Sum bias;     // of the tile
  Sum divisor;  // of the tile's weights
  bool masked;

  // keys is the number of rows of the tile that the loop will touch, padding of the last step included.
  PanelOnTile(const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys)
      : bias(tile.bias),
        divisor(tile.divisor),
        masked(panel.all.first > tile.first || panel.all.end < tile.first + keys) {
    const std::int64_t key0 = tile.first;
    if (!masked && !panel.alibi) return;
    for (int lane = 0; lane < panel.vectors * kLanes<Sum>; ++lane) {
      position[lane] = Sum(panel.position[lane] - key0);
      first[lane] = MaskInt<Sum>(larger<std::int64_t>(panel.visible[lane].first - key0, 0));
      end[lane] = MaskInt<Sum>(smaller(larger<std::int64_t>(panel.visible[lane].end - key0, 0), keys));
    }
  }

  // Of a tile that is masked.
  bool sees(std::int64_t lane, std::int64_t key) const { return key >= first[lane] && key < end[lane]; }

  // What terms of logits do in the loops, where there are some, stands in logits/terms.h: to a weight, or to what is
  // known of its gradient, at element `at` of the tile; to the logit that a weight is made of; to a weight and the
  // gradient of its logit; and to that gradient on the way to the product.
  static ATTNX_INLINE Vec<Sum> kept(std::int64_t /*at*/, Vec<Sum> x) { return x; }
  template <class Score>
  static ATTNX_INLINE Vec<Sum> bounded(const Score&, int /*lane*/, Vec<Sum> x) {
    return x;
  }
  template <class Score>
  static ATTNX_INLINE void take_share(const Score&, std::int64_t /*at*/, Vec<Sum> /*dp*/, Vec<Sum>& /*p*/,
                                      Vec<Sum>& /*ds*/) {}
  static ATTNX_INLINE Vec<Sum> to_product(std::int64_t /*at*/, Vec<Sum> ds) { return ds; }
  // The forward says what the derivative of a weight by its logit is, which tangents/given.h asks for; softmax does so
  // before the sum of the row is taken.
  static ATTNX_INLINE void take_derivative(std::int64_t /*at*/, int /*lane*/, Vec<Sum> /*derivative*/) {}
};

template <bool value>
struct Flag {
  static constexpr bool kValue = value;
};

// How the rows of a head, or of the heads that share keys, are cut into tiles and these into panels.
template <class Sum>
struct RowTiling {
  std::int64_t group;  // query heads whose rows interleave
  std::int64_t panels, panel_rows, tile_rows;

  // Rows of a tile share one list of blocks, which belongs to one head and one block of queries; or one cluster, which
  // belongs to one head.
  RowTiling(const AttentionParams& p, bool listed, bool gathered, std::int64_t most_panels)
      : group(listed || gathered ? 1 : p.heads_q / p.heads_k),
        panels(most_panels),
        panel_rows(kPanelLanes<Sum>),
        tile_rows(panels * panel_rows) {
    if (listed) {
      for (tile_rows = p.block_q; tile_rows > most_panels * kPanelLanes<Sum>;) tile_rows /= 2;
    } else if (p.length_q * group < tile_rows) {
      tile_rows = larger<std::int64_t>(p.length_q * group, 1);  // all there are, in panels of even shares
    } else {
      return;
    }
    panels = (tile_rows + kPanelLanes<Sum> - 1) / kPanelLanes<Sum>;
    panel_rows = round_up((tile_rows + panels - 1) / panels, kLanes<Sum>);
  }
};

// Calls body(step, offset, x, visible) for every step of every vector of the tile of products s[keys][lanes]:
// x = the kStep logits, offset = where their first vector starts in a B operand. The flags are compile-time, so a
// plain tile pays for neither mask nor distance.
template <class A, class Body>
ATTNX_INLINE void for_each_logit(const typename A::Sum* s, std::int64_t keys, typename A::Sum scale,
                                 const Panel<typename A::Sum>& panel, const PanelOnTile<typename A::Sum>& on_tile,
                                 int vector, Body body) {
  using Sum = typename A::Sum;
  constexpr int kStep = A::kStep, kWidth = kPanelLanes<Sum>;
  const int lane = vector * kLanes<Sum>;
  const auto loop = [&](auto alibi, auto masked) __attribute__((always_inline)) {
    const Vec<Sum> bias = load(panel.bias + lane) + on_tile.bias, slope = load(panel.slope + lane);
    const Vec<Sum> position = load(on_tile.position + lane);
    const Mask<Sum> first = load(on_tile.first + lane), end = load(on_tile.end + lane);
    for (std::int64_t key = 0; key < keys; key += kStep) {
      Vec<Sum> x[kStep];
      Mask<Sum> visible[kStep];
      for (int k = 0; k < kStep; ++k) {
        x[k] = load(s + (key + k) * kWidth + lane) * scale + bias;
        if constexpr (alibi.kValue) x[k] -= slope * absolute(position - Sum(key + k));
        if constexpr (masked.kValue) {
          const auto n = MaskInt<Sum>(key + k);
          visible[k] = (first <= n) & (end > n);
        }
      }
      body(key, x, visible, masked);
    }
  };
  if (on_tile.masked) {
    panel.alibi ? loop(Flag<true>{}, Flag<true>{}) : loop(Flag<false>{}, Flag<true>{});
  } else {
    panel.alibi ? loop(Flag<true>{}, Flag<false>{}) : loop(Flag<false>{}, Flag<false>{});
  }
}

// The same for one row whose keys lie on the lanes, s[keys]: calls body(key, x, visible, masked) for every vector of
// them. keys is a whole number of vectors.
template <class A, class Body>
ATTNX_INLINE void for_each_logit_of_row(const typename A::Sum* s, std::int64_t keys, typename A::Sum scale,
                                        const Panel<typename A::Sum>& panel,
                                        const PanelOnTile<typename A::Sum>& on_tile, int row, Body body) {
  using Sum = typename A::Sum;
  const Sum bias = panel.bias[row] + on_tile.bias, slope = panel.slope[row];
  const auto loop = [&](auto alibi, auto masked) __attribute__((always_inline)) {
    for (std::int64_t key = 0; key < keys; key += kLanes<Sum>) {
      Vec<Sum> x = load(s + key) * scale + bias;
      if constexpr (alibi.kValue) x -= slope * absolute(on_tile.position[row] - Sum(key) - lane_numbers<Sum>());
      Mask<Sum> visible = {};
      if constexpr (masked.kValue) {
        const Mask<Sum> n = lane_numbers<MaskInt<Sum>>() + MaskInt<Sum>(key);
        visible = (on_tile.first[row] <= n) & (on_tile.end[row] > n);
      }
      body(key, x, visible, masked);
    }
  };
  if (on_tile.masked) {
    panel.alibi ? loop(Flag<true>{}, Flag<true>{}) : loop(Flag<false>{}, Flag<true>{});
  } else {
    panel.alibi ? loop(Flag<true>{}, Flag<false>{}) : loop(Flag<false>{}, Flag<false>{});
  }
}

}  // namespace attnx::cpu::ATTNX_ISA
