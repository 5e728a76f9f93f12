// This cuts linear attention with a state into more units than heads of keys, for threads that outnumber those: the
// rows of a state are summed up apart from each other, and the chunks of queries or of keys that read the states, too.
// What is computed is the same, in the same order, as where a head is one unit.
#pragma once

#include "../phases.h"
#include "../units.h"
#include "chunk.h"

namespace attnx::cpu::ATTNX_ISA {

struct LinearStateSlices {
  std::int64_t heads, features;  // heads of keys in the batch
  std::int64_t rows;             // of a state, of one unit

  LinearStateSlices(const LinearStateParams& p, int threads) : heads(p.batch * p.heads_k), features(p.features()) {
    const std::int64_t wanted = heads > 0 ? (threads + heads - 1) / heads : 1;
    rows = round_up((features + wanted - 1) / wanted, kRowMultiple);
  }

  bool are_wanted(const LinearStateParams& p, int threads) const {
    constexpr std::int64_t kTokens = 64;
    return heads > 0 && heads < threads && larger(p.length_q, p.length_k) > kTokens;
  }
  std::int64_t units() const { return heads * per_head(); }
  std::int64_t head(std::int64_t unit) const { return unit / per_head(); }
  FeatureRows rows_of(std::int64_t unit) const {
    const std::int64_t first = unit % per_head() * rows;
    return {first, smaller(rows, features - first)};
  }

 private:
  std::int64_t per_head() const { return (features + rows - 1) / rows; }
};

inline std::int64_t chunks_of(std::int64_t length, std::int64_t tokens) { return (length + tokens - 1) / tokens; }

}  // namespace attnx::cpu::ATTNX_ISA
