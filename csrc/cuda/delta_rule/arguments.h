// The kernels of the gated delta rule are passed this. Columns of a state do not meet, so a block takes some columns of
// a head through all chunks. W, P, D and G are those of cpu/kernel/delta_rule/chunk.h.
#pragma once

#include "attnx/delta_rule_params.h"

namespace attnx::cuda {

struct DeltaRuleArguments {
  DeltaRuleParams p;
  int chunk;                           // tokens
  int tiles, width;                    // of columns of the values; width is a multiple of 8
  int chunks;                          // of a head
  std::int64_t first_head = 0, heads;  // of values, among batch * heads_v, of this launch
};

inline constexpr int kDeltaThreads = 256, kDeltaWarps = kDeltaThreads / 32;
inline constexpr int kMaxDeltaChunk = 64;

}  // namespace attnx::cuda
