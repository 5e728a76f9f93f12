// This says how many blocks of keys a row of blocks makes critical, marginal and negligible, and which of them are
// critical whatever their rank. Host and device share it.
#pragma once

#include <cmath>

#include "attnx/block_sampling.h"

namespace attnx {

struct BlockShares {
  double critical = 0, negligible = 0;  // of the blocks that some query of the row sees
  bool round_down = false;              // the number of critical blocks, which is rounded up otherwise
  std::int64_t protect = 0;             // the first keys, whose blocks are critical
};

struct LabelRow {
  std::int64_t candidates;      // the blocks [0, candidates) are seen by some query; others are negligible
  std::int64_t begin, end;      // the candidates outside of these are critical, and these are ranked
  std::int64_t critical;        // the best so many of the ranked blocks are critical
  std::int64_t not_negligible;  // the best so many are critical or marginal

  ATTNX_HOST_DEVICE LabelRow(const BlockGrid& grid, const BlockShares& shares, std::int64_t row) {
    const std::int64_t last_query = smaller((row + 1) * grid.block_q, grid.length_q) - 1;
    const std::int64_t of_first = keys_seen(grid, row * grid.block_q), of_last = keys_seen(grid, last_query);
    candidates = (of_last + grid.block_k - 1) / grid.block_k;
    // Blocks that only some queries of the row see, and the last of the candidates, are not ranked.
    end = grid.is_causal ? larger(smaller(of_first / grid.block_k, candidates - 1), 0) : candidates;
    begin = smaller((smaller(shares.protect, grid.length_k) + grid.block_k - 1) / grid.block_k, end);
    const std::int64_t unranked = candidates - (end - begin);
    const double share = share_of(shares.critical, candidates);
    const auto most = std::int64_t(shares.round_down ? floor(share) : ceil(share));
    const std::int64_t least = candidates - std::int64_t(floor(share_of(shares.negligible, candidates)));
    const std::int64_t all_critical = smaller(larger(1, larger(most, unranked)), candidates);
    critical = all_critical - unranked;
    not_negligible = larger(all_critical, least) - unranked;
  }

 private:
  ATTNX_HOST_DEVICE static std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
  ATTNX_HOST_DEVICE static std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

  // It returns how many keys a query sees; these are the first ones.
  ATTNX_HOST_DEVICE static std::int64_t keys_seen(const BlockGrid& grid, std::int64_t query) {
    if (!grid.is_causal) return grid.length_k;
    return larger(smaller(query + grid.length_k - grid.length_q + 1, grid.length_k), 0);
  }
  // It returns share * count, without the last bits in which a product that should be whole is not.
  ATTNX_HOST_DEVICE static double share_of(double share, std::int64_t count) {
    return nearbyint(share * double(count) * 0x1p30) * 0x1p-30;
  }
};

}  // namespace attnx
