// Every kernel of attention is passed this: which rows and keys a call has, and how they fall into tiles. It is plain
// data, which the host fills in; sequence.h reads it on the device.
#pragma once

#include "attnx/params.h"
#include "cuda/common/divisor.h"

namespace attnx::cuda {

inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
inline constexpr int kUnbounded = 1 << 30;  // lengths are below it, windows at most it

struct Geometry {
  std::int64_t batch, heads_q, heads_k;
  std::int64_t length_q, length_k;  // of the longest sequence
  std::int64_t head_dim, value_dim;
  const std::int32_t* cu_seqlens_q;           // null: tensors are not packed, and sequences have all queries
  const std::int32_t *key_starts, *key_ends;  // null: every sequence has all keys
  // So many query heads on a key head have rows that share a tile, as (query, head of the group).
  Divisor group;
  Divisor heads;         // heads of tiles of rows
  Divisor query_blocks;  // tiles along the longest sequence's rows
  int tiles_of_block;    // tiles of rows to a block of queries with lists, which rows fill up; else 1
  int left, right;       // the window, at most kUnbounded
  int position_offset;   // how far beyond the aligned key a query stands
};

// This is done to a product to make it a logit.
struct LogitScaling {
  float scale, scale_log2;  // the latter is times log2(e)
  PerHead alibi_slopes;
};

}  // namespace attnx::cuda
