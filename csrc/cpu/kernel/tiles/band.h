// Tiles of a band around the diagonal: dense, causal and sliding-window attention are three widths of it.
#pragma once

#include "../panel.h"

namespace attnx::cpu::ATTNX_ISA {

class BandTiles {
 public:
  static constexpr bool kListed = false;

  template <class Sequence>
  BandTiles(const AttentionParams& p, const Sequence& s, std::int64_t /*head*/, std::int64_t /*query*/)
      : left_(bound(p.window_left)), right_(bound(p.window_right)), length_(s.length_k) {}

  // The keys that the query standing at this key position sees.
  KeyRange row(std::int64_t position) const {
    const std::int64_t first = smaller(larger<std::int64_t>(position - left_, 0), length_);
    return {first, smaller(larger(position + right_ + 1, first), length_)};
  }
  std::int64_t keys_in_band(std::int64_t position) const {
    const KeyRange keys = row(position);
    return keys.end - keys.first;
  }

  // Calls visit(KeyTile) for the tiles that hold the range.
  template <class Visit>
  void for_each(KeyRange range, std::int64_t tile, Visit visit) const {
    if (range.first >= range.end) return;
    for (std::int64_t key = range.first / tile * tile; key < range.end; key += tile)
      visit(KeyTile{key, smaller(tile, length_ - key), key + tile});
  }

 private:
  // Without a bound, or with one beyond any length: as far as positions can be added to without overflow.
  static std::int64_t bound(std::int64_t window) {
    constexpr std::int64_t kNone = std::int64_t(1) << 60;
    return window < 0 ? kNone : smaller(window, kNone);
  }

  std::int64_t left_, right_, length_;
};

}  // namespace attnx::cpu::ATTNX_ISA
