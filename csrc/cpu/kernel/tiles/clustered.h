// Tiles of the keys of one cluster, which stand in the order of time: all of them, or those up to the query.
#pragma once

#include "../storage/gathered.h"
#include "band.h"

namespace attnx::cpu::ATTNX_ISA {

class ClusteredTiles {
 public:
  static constexpr bool kListed = false;

  ClusteredTiles(const AttentionParams& p, const GatheredSequence& s, std::int64_t head, std::int64_t query)
      : all_(p, s, head, query), sequence_(s), is_causal_(p.window_right == 0) {}

  // Where queries have the indices of keys this is a triangle.
  KeyRange row(std::int64_t position) const {
    const std::int64_t length = sequence_.length_k;
    if (!is_causal_) return {0, length};
    const std::int64_t time = sequence_.query_row(position - length + sequence_.length_q) + sequence_.lead;
    std::int64_t low = sequence_.memory, high = length;  // keys before low are not later, keys from high on are
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (sequence_.key_row(middle) <= time) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return {0, low};
  }
  std::int64_t keys_in_band(std::int64_t position) const { return row(position).end; }

  template <class Visit>
  void for_each(KeyRange range, std::int64_t tile, Visit visit) const {
    all_.for_each(range, tile, visit);
  }

 private:
  BandTiles all_;
  const GatheredSequence& sequence_;
  bool is_causal_;
};

}  // namespace attnx::cpu::ATTNX_ISA
