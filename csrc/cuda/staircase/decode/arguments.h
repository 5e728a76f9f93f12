// This is what decoding over a staircase cache is told. A block computes some tiles of 8 rows of queries that share a
// key head over a share of the tokens.
#pragma once

#include "attnx/params.h"
#include "cuda/common/divisor.h"

namespace attnx::cuda {

inline constexpr int kDecodeRows = 8;     // of a tile: N of mma.m16n8k16
inline constexpr int kDecodeWarps = 4;    // of a block
inline constexpr int kDecodeTokens = 32;  // of a tile of codes
inline constexpr int kTailTokens = 16;    // of a tile of the tail: M of mma.m16n8k16

// So many blocks are on a multiprocessor at a time, by what their registers and shared memory leave room for.
inline constexpr int decode_blocks_per_sm(std::int64_t head_dim, int tiles) {
  return tiles <= 2 && tiles * head_dim <= 256 ? 3 : 2;
}

// This is what blocks leave to the last one of those that share rows. Each array starts with [row block][split].
struct DecodeParts {
  float* output = nullptr;  // [rows][head_dim]
  float2* sums = nullptr;   // [rows] of (maximum, sum of weights)
  int* finished = nullptr;  // [row block] alone: how many blocks are
};

struct DecodeArguments {
  Staircase cache;
  Tensor query, output, logsumexp;  // the latter is float32 and null without
  const std::int64_t* query_lengths;
  bool bfloat16, softmax, causal;
  float scale_log2;

  // The bias is the sigmoid's.
  BiasRule bias_rule;
  float bias_value;
  PerHead bias;

  int length_q, heads_q, row_blocks, splits;
  int groups;                                 // of channels that share a range
  std::int64_t matrix_ranges, window_ranges;  // as of the layout, which divides
  Divisor heads_on_key_head;
  Divisor window_tiles, group_tiles;  // of 32 tokens or channels
  DecodeParts parts;
};

}  // namespace attnx::cuda
