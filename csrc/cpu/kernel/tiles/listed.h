// Tiles of the blocks of keys that a list names for each block of queries: block-sparse attention.
#pragma once

#include "band.h"

namespace attnx::cpu::ATTNX_ISA {

class ListedTiles {
 public:
  static constexpr bool kListed = true;

  // For the block that holds the query. Blocks beyond the end of a shorter sequence have no keys.
  ListedTiles(const AttentionParams& p, const Sequence& s, std::int64_t head, std::int64_t query)
      : band_(p, s, head, query), block_(p.block_k), length_(s.length_k) {
    const BlockList& list = p.key_blocks;
    const std::int64_t row = query / p.block_q;
    count_ = list.counts[s.batch * list.counts_batch_stride + head * list.counts_head_stride + row];
    indices_ = list.indices + s.batch * list.indices_batch_stride + head * list.indices_head_stride +
               row * list.indices_row_stride;
    const std::int64_t terms =
        s.batch * list.bias_batch_stride + head * list.bias_head_stride + row * list.bias_row_stride;
    if (list.bias) bias_ = list.bias + terms;
    if (list.divisor) divisor_ = list.divisor + terms;
    hull_ = {length_, 0};
    for (std::int64_t i = 0; i < count_; ++i) {
      const std::int64_t first = indices_[i] * block_;
      if (first >= length_ || is_hidden(i)) continue;
      hull_ = {smaller(hull_.first, first), larger(hull_.end, smaller(first + block_, length_))};
    }
  }

  // From the first to the last listed key that the band shows: empty where it shows none, as no window has a left
  // bound with lists.
  KeyRange row(std::int64_t position) const {
    const KeyRange band = band_.row(position);
    const std::int64_t first = larger(band.first, hull_.first);
    return {first, larger(first, smaller(band.end, hull_.end))};
  }
  std::int64_t keys_in_band(std::int64_t position) const { return band_.keys_in_band(position); }

  // Calls visit(KeyTile) for the tiles of the listed blocks that meet the range.
  template <class Visit>
  void for_each(KeyRange range, std::int64_t /*tile*/, Visit visit) const {
    constexpr std::int64_t kTile = 64;  // divides every block
    for (std::int64_t i = 0; i < count_; ++i) {
      if (is_hidden(i)) continue;
      const std::int64_t block = indices_[i] * block_, end = smaller(block + block_, length_);
      for (std::int64_t key = block; key < end; key += kTile) {
        if (key >= range.end || key + kTile <= range.first) continue;
        const std::int64_t next = key + kTile < end ? key + kTile : i + 1 < count_ ? indices_[i + 1] * block_ : length_;
        visit(KeyTile{key, smaller(kTile, end - key), next, bias_ ? bias_[i] : 0, divisor_ ? divisor_[i] : 1, i});
      }
    }
  }

 private:
  // What a bias of -inf hides counts as not listed.
  bool is_hidden(std::int64_t i) const { return bias_ && bias_[i] == -__builtin_huge_valf(); }

  BandTiles band_;
  std::int64_t block_, length_, count_;
  const std::int32_t* indices_;
  const float *bias_ = nullptr, *divisor_ = nullptr;
  KeyRange hull_;
};

}  // namespace attnx::cpu::ATTNX_ISA
