// Tiles of a band around the diagonal: dense, causal and sliding-window attention are three widths of it.
#pragma once

#include "../panel.h"

namespace attnx::cpu::ATTNX_ISA {

class BandTiles {
 public:
  BandTiles(const AttentionParams& p, const Sequence& s)
      : left_(p.window_left), right_(p.window_right), length_(s.length_k) {}

  // The keys that the query standing at this key position sees.
  KeyRange row(std::int64_t position) const {
    std::int64_t first = left_ < 0 ? 0 : position - left_, end = right_ < 0 ? length_ : position + right_ + 1;
    first = smaller(larger<std::int64_t>(first, 0), length_);
    return {first, smaller(larger(end, first), length_)};
  }

  // Calls visit(first key, number of keys) for the tiles that hold the range.
  template <class Visit>
  void for_each(KeyRange range, std::int64_t tile, Visit visit) const {
    if (range.first >= range.end) return;
    for (std::int64_t key = range.first / tile * tile; key < range.end; key += tile)
      visit(key, smaller(tile, length_ - key));
  }

 private:
  std::int64_t left_, right_, length_;
};

}  // namespace attnx::cpu::ATTNX_ISA
