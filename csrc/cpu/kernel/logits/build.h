// What is added to the products of a tile is put together here: bias, distance, mask, bias and share of keys, and the
// bounds of the rows. Terms lie along keys in memory, and are transposed onto the lanes of queries.
#pragma once

#include "../arena.h"
#include "../dtype.h"
#include "../random.h"
#include "../rows.h"
#include "table_rows.h"
#include "tile.h"

namespace attnx::cpu::ATTNX_ISA {

// Where the numbers of a panel's rows lie.
template <class Sum>
struct TermRows {
  const char* mask[kPanelLanes<Sum>];
  bool one_mask;  // for all rows
  bool one_head;
  std::int64_t first_head;  // of the sequence, counted over the batch
};

// kShareInLogit: a key's share of its weights is a term of the logit, its logarithm, as normalised scores in the
// forward have it. kShareHides: a share of 0 hides the key.
template <class Sum, bool kShareInLogit>
class TermBuilder {
  static constexpr int kWidth = kPanelLanes<Sum>, kMostPanels = 4;
  static constexpr Sum kHidden = -__builtin_huge_valf();

 public:
  TermBuilder(const AttentionParams& p, bool share_hides, bool kept_count_one, std::int64_t tile_keys,
              std::int64_t panels, Arena& arena)
      : p_(p),
        terms_(p.terms),
        share_hides_(share_hides),
        group_(p.heads_q / p.heads_k),
        tile_keys_(tile_keys),
        dropout_(p.terms),
        tables_(p, arena),
        kept_number_(kept_count_one ? 1 : Sum(dropout_.factor())) {
    added_ = arena.take<Sum>(tile_keys * kWidth);
    if (terms_.dropout != 0) kept_ = arena.take<Sum>(tile_keys * kWidth);
    if (terms_.key_mask.data && !kShareInLogit) shares_ = arena.take<Sum>(tile_keys * kWidth);
    key_terms_ = arena.take<Sum>(group_ * tile_keys);
    key_terms_of_ = arena.take<std::int64_t>(group_);
    rows_ = arena.take<TermRows<Sum>>(panels);
  }

  template <class Sequence>
  void begin(int i, const Panel<Sum>& panel, const Sequence& s) {
    TermRows<Sum>& rows = rows_[i];
    batch_ = s.batch, first_k_ = s.first_k;
    const PairMask& mask = terms_.attn_mask;
    rows.one_head = group_ == 1;
    rows.one_mask = !terms_.tables.index && mask.row_stride == 0 && (mask.head_stride == 0 || rows.one_head);
    rows.first_head = s.batch * p_.heads_q;
    for (int lane = 0; lane < kWidth; ++lane)
      rows.mask[lane] = static_cast<const char*>(mask.data) +
                        number_bytes() * (s.batch * mask.batch_stride + panel.head[lane] * mask.head_stride +
                                          panel.query[lane] * mask.row_stride);
  }

  // What is known of keys alone is computed once for the panels of a tile, when the first asks.
  void set_tile(const KeyTile& tile) {
    tile_ = tile;
    for (std::int64_t g = 0; g < group_; ++g) key_terms_of_[g] = -1;
  }

  // It fills all arrays, and tells whether the panel sees none of the keys.
  bool fill(int i, const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys) {
    switch (terms_.attn_mask.kind) {
      case MaskKind::kNone:
        tables_.prepare();
        tables_.any() ? fill_added<ByTable>(rows_[i], panel, tile, keys)
                      : fill_added<None>(rows_[i], panel, tile, keys);
        break;
      case MaskKind::kBool: fill_added<bool>(rows_[i], panel, tile, keys); break;
      case MaskKind::kInput: fill_from_input(rows_[i], panel, tile, keys); break;
      case MaskKind::kSum: fill_added<Sum>(rows_[i], panel, tile, keys); break;
    }
    if (hides_all_) return true;
    if (kept_) dropout_.fill(panel, rows_[i].first_head, tile.first, keys, kept_number_, kept_);
    if (shares_) fill_shares(rows_[i], panel, keys);
    return false;
  }

  TermsOnTile<Sum> on_tile(const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys) const {
    TermsOnTile<Sum> x(panel, tile, keys, added_, hides_);
    x.cap = Sum(terms_.softcap);
    x.inverse_cap = terms_.softcap == 0 ? 0 : Sum(1 / terms_.softcap);
    return x;
  }

  const Dropout& dropout() const { return dropout_; }
  const TableRows<Sum>& tables() const { return tables_; }
  Sum* kept() const { return kept_; }
  Sum* shares() const { return shares_; }

 private:
  struct None {};
  struct ByTable {};

  std::int64_t number_bytes() const {
    switch (terms_.attn_mask.kind) {
      case MaskKind::kBool: return 1;
      case MaskKind::kInput: return is_narrow(p_.dtype) ? 2 : sizeof(Sum);
      default: return sizeof(Sum);
    }
  }

  // Bias and logarithm of the share of the keys of the tile, for a head.
  const Sum* key_terms(std::int64_t head) {
    const std::int64_t g = head % group_;
    Sum* const row = key_terms_ + g * tile_keys_;
    if (key_terms_of_[g] == head) return row;
    key_terms_of_[g] = head;
    const Sum* const bias = key_row(terms_.key_bias, head);
    const Sum* const share = kShareInLogit || share_hides_ ? key_row(terms_.key_mask, head) : nullptr;
    for (std::int64_t key = 0; key < tile_.count; ++key) {
      row[key] = bias ? bias[key] : 0;
      if (!share) continue;
      if (share[key] == 0) {
        row[key] = kHidden;
      } else if (kShareInLogit && share[key] != 1) {
        row[key] += Sum(__builtin_log(double(share[key])));
      }
    }
    for (std::int64_t key = tile_.count; key < tile_keys_; ++key) row[key] = kHidden;
    return row;
  }
  const Sum* key_row(const PerKey& x, std::int64_t head) const {
    if (!x.data) return nullptr;
    return static_cast<const Sum*>(x.data) + batch_ * x.batch_stride + head * x.head_stride + first_k_ + tile_.first;
  }
  bool has_key_terms() const { return terms_.key_bias.data || terms_.key_mask.data; }

  // As many numbers of a row of the mask as a vector holds, which lie together, from the given key on.
  template <class Number>
  ATTNX_INLINE Vec<Sum> numbers_of(const char* row, std::int64_t key) const {
    if constexpr (__is_same(Number, bool)) {
      return load_flags<Sum>(reinterpret_cast<const std::uint8_t*>(row) + tile_.first + key) ? Vec<Sum>{}
                                                                                             : splat(kHidden);
    } else {
      return load_as<Sum>(reinterpret_cast<const Number*>(row) + tile_.first + key);
    }
  }
  // The same of numbers that may lie apart; keys that there are not are hidden.
  template <class Number>
  ATTNX_INLINE Vec<Sum> mask_of(const char* row, std::int64_t key) const {
    const std::int64_t stride = terms_.attn_mask.key_stride, left = tile_.count - key;
    if constexpr (__is_same(Number, None)) {
      if (left >= kLanes<Sum>) return Vec<Sum>{};
    } else if constexpr (__is_same(Number, bool)) {
      const auto* const from = reinterpret_cast<const std::uint8_t*>(row) + (tile_.first + key) * stride;
      if (stride == 1 && left >= kLanes<Sum>) return numbers_of<bool>(row, key);
      return by_number(left, [&](std::int64_t i) { return from[i * stride] ? Sum(0) : kHidden; });
    } else {
      const auto* const from = reinterpret_cast<const Number*>(row) + (tile_.first + key) * stride;
      if (stride == 1 && left >= kLanes<Sum>) return load_as<Sum>(from);
      if (stride == -1 && left >= kLanes<Sum>) return reversed<Sum>(load_as<Sum>(from - (kLanes<Sum> - 1)));
      return by_number(left, [&](std::int64_t i) { return Sum(to_float(from[i * stride])); });
    }
    return by_number(left, [](std::int64_t) { return Sum(0); });
  }
  // The numbers of the query's row, for the row of a lane.
  ATTNX_INLINE Vec<Sum> of_query_table(const Panel<Sum>& panel, int lane, std::int64_t key) const {
    const std::int64_t query = panel.query[lane], left = tile_.count - key, first = tile_.first + key;
    const Tensor& table = terms_.tables.query;
    if (!table.data) return by_number(left, [](std::int64_t) { return Sum(0); });
    const auto* const row = row_of<const Sum>(table, batch_, panel.head[lane], query);
    if (left >= kLanes<Sum>) return tables_.of_keys(row, query, first);
    return by_number(left, [&](std::int64_t i) { return row[tables_.number(query, first + i)]; });
  }
  // The numbers of the key's row, for a vector of lanes. All of them are rows of a head where they are `consecutive`.
  ATTNX_INLINE Vec<Sum> of_key_table(const Panel<Sum>& panel, int lane, bool consecutive, std::int64_t key) const {
    const std::int64_t at = tile_.first + key;
    const auto row = [&](int i) { return row_of<const Sum>(terms_.tables.key, batch_, panel.head[lane + i], at); };
    if (consecutive) return tables_.of_queries(row(0), panel.query[lane], at);
    Vec<Sum> x{};
    for (int i = 0; i < kLanes<Sum>; ++i) x[i] = row(i)[tables_.number(panel.query[lane + i], at)];
    return x;
  }
  template <class Read>
  static Vec<Sum> by_number(std::int64_t left, const Read& read) {
    Vec<Sum> x = splat(kHidden);
    for (int i = 0; i < kLanes<Sum> && i < left; ++i) x[i] = read(i);
    return x;
  }

  static bool is_narrow(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

  void fill_from_input(const TermRows<Sum>& rows, const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys) {
    if constexpr (sizeof(Sum) == sizeof(float)) {
      if (p_.dtype == DType::kBFloat16) return fill_added<BFloat16>(rows, panel, tile, keys);
      if (p_.dtype == DType::kFloat16) return fill_added<Float16>(rows, panel, tile, keys);
    }
    fill_added<Sum>(rows, panel, tile, keys);
  }

  template <class Number>
  void fill_added(const TermRows<Sum>& rows, const Panel<Sum>& panel, const KeyTile& tile, std::int64_t keys) {
    const bool one_row = rows.one_mask && (rows.one_head || !has_key_terms());
    const auto along_keys = [&](int lane, std::int64_t key) __attribute__((always_inline)) {
      Vec<Sum> x;
      if constexpr (__is_same(Number, ByTable)) {
        x = of_query_table(panel, lane, key);
      } else {
        x = mask_of<Number>(rows.mask[lane], key);
      }
      if (has_key_terms()) x += load(key_terms(panel.head[lane]) + key);
      return x;
    };
    constexpr bool kStored = !__is_same(Number, None) && !__is_same(Number, ByTable);
    const bool lie_together = kStored && terms_.attn_mask.key_stride == 1 && !has_key_terms();
    Content content;
    for (int v = 0; v < panel.vectors; ++v) {
      const int lane = v * kLanes<Sum>;
      const Vec<Sum> bias = load(panel.bias + lane) + tile.bias;
      const bool consecutive = rows.one_head && lane + kLanes<Sum> <= panel.rows;
      const auto put = [&](std::int64_t key, Vec<Sum> x) __attribute__((always_inline)) {
        x += bias;
        if constexpr (__is_same(Number, ByTable))
          if (terms_.tables.key.data && key < tile_.count) x += of_key_table(panel, lane, consecutive, key);
        content.add(x);
        store(added_ + key * kWidth + lane, x);
      };
      for (std::int64_t key = 0; key < keys; key += kLanes<Sum>) {
        if (one_row) {
          const Vec<Sum> x = along_keys(0, key);
          for (int i = 0; i < kLanes<Sum>; ++i) put(key + i, splat(x[i]));
        } else {
          Vec<Sum> x[kLanes<Sum>];
          if (lie_together && key + kLanes<Sum> <= tile_.count) {
            if constexpr (kStored) {
#pragma GCC unroll 16
              for (int i = 0; i < kLanes<Sum>; ++i) x[i] = numbers_of<Number>(rows.mask[lane + i], key);
            }
          } else {
            for (int i = 0; i < kLanes<Sum>; ++i) x[i] = along_keys(lane + i, key);
          }
          transpose_lanes<Sum>(x);
          for (int i = 0; i < kLanes<Sum>; ++i) put(key + i, x[i]);
        }
      }
    }
    const PanelOnTile<Sum> bounds(panel, tile, keys);
    if (panel.alibi || bounds.masked) content = add_places(panel, bounds, keys);
    hides_ = content.hides(), hides_all_ = content.hides_all();
  }

  // Whether numbers hide some of the pairs, or all.
  struct Content {
    Vec<Sum> lowest = {};
    Mask<Sum> seen = {};  // bits in which a number is not -inf

    ATTNX_INLINE void add(Vec<Sum> x) {
      lowest = minimum(lowest, x);
      seen |= bit_cast<Mask<Sum>>(x) ^ bit_cast<Mask<Sum>>(splat(kHidden));
    }
    bool hides() const { return bits(lowest == kHidden) != 0; }
    bool hides_all() const { return bits(seen != 0) == 0; }
  };

  // What depends on the places of queries and keys: slopes, and the bounds of the rows, which few tiles meet.
  Content add_places(const Panel<Sum>& panel, const PanelOnTile<Sum>& bounds, std::int64_t keys) {
    Content content;
    for (int lane = 0; lane < panel.vectors * kLanes<Sum>; lane += kLanes<Sum>) {
      const Vec<Sum> slope = load(panel.slope + lane);
      for (std::int64_t key = 0; key < keys; ++key) {
        Sum* const at = added_ + key * kWidth + lane;
        Vec<Sum> x = load(at);
        if (panel.alibi) x -= slope * absolute(load(bounds.position + lane) - Sum(key));
        if (bounds.masked) {
          const auto n = MaskInt<Sum>(key);
          x = (load(bounds.first + lane) <= n) & (load(bounds.end + lane) > n) ? x : splat(kHidden);
        }
        content.add(x);
        store(at, x);
      }
    }
    return content;
  }

  void fill_shares(const TermRows<Sum>& rows, const Panel<Sum>& panel, std::int64_t keys) {
    const bool one_row = rows.one_head || terms_.key_mask.head_stride == 0;
    for (int lane = 0; lane < panel.vectors * kLanes<Sum>; ++lane) {
      const Sum* const row = key_row(terms_.key_mask, panel.head[lane]);
      for (std::int64_t key = 0; key < keys; ++key) {
        const Sum share = key < tile_.count ? row[key] : 0;
        hides_ |= share == 0;
        if (!one_row) {
          shares_[key * kWidth + lane] = share;
          continue;
        }
        for (int v = 0; v < panel.vectors; ++v) store(shares_ + key * kWidth + v * kLanes<Sum>, splat(share));
      }
      if (one_row) return;
    }
  }

  const AttentionParams& p_;
  const LogitTerms& terms_;
  bool share_hides_;
  std::int64_t group_, tile_keys_;
  Dropout dropout_;
  TableRows<Sum> tables_;
  Sum kept_number_;
  Sum *added_, *kept_ = nullptr, *shares_ = nullptr;  // [keys][lanes]
  Sum* key_terms_;                                    // [group][keys]
  std::int64_t* key_terms_of_;                        // the head that each row of these is about, or -1
  TermRows<Sum>* rows_;
  KeyTile tile_{};
  std::int64_t batch_ = 0, first_k_ = 0;
  bool hides_ = false, hides_all_ = false;
};

}  // namespace attnx::cpu::ATTNX_ISA
