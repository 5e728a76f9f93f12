// The selections of blocks are told these: sampling, labels of a map, and lists from labels.
#pragma once

#include "attnx/block_labels.h"
#include "attnx/block_sampling.h"
#include "attnx/params.h"

namespace attnx {

// The kernel lists the blocks of keys that one round keeps for each block of queries, ascending. Entries of a row that
// are not in use hold 0.
struct SampleBlocksParams {
  BlockGrid grid;                      // of the longest sequence
  SequenceLengths lengths;             // of all
  std::int64_t heads = 0;              // of the whole batch
  std::int64_t sequence_heads = 1;     // of one sequence
  const float* keep = nullptr;         // [key blocks, or more], the probability at each distance
  const std::int64_t* seed = nullptr;  // one number each, which the kernel reads
  const std::int64_t* offset = nullptr;
  std::int64_t blocks_per_row = 0;  // 0: each block is kept or not on its own
  std::int32_t* counts = nullptr;   // [heads, query blocks]
  std::int32_t* indices = nullptr;  // [heads, query blocks, key blocks]
  // These make up for the blocks that are left out, and may be null: -log p of each listed block, which is added to its
  // logits, or p, by which its weights are divided. Entries that are not in use are not written.
  float* corrections = nullptr;  // like indices
  bool logarithm = false;

  // These are the same transposed, of each block of keys, and null where they are not wanted. Only CUDA's kernel has
  // them.
  std::int32_t* query_counts = nullptr;   // [heads, key blocks]
  std::int32_t* query_indices = nullptr;  // [heads, key blocks, query blocks]
  float* query_corrections = nullptr;     // like query_indices, or null
};

// The kernel tells which blocks of keys are critical (1), marginal (0) and negligible (-1) to each block of queries, by
// their products.
struct LabelBlocksParams {
  BlockGrid grid;
  std::int64_t heads = 0;
  DType dtype = DType::kFloat32;   // of products: kFloat32 or, on the CPU, kFloat64
  const void* products = nullptr;  // [heads, query blocks, key blocks]
  BlockShares shares;
  std::int8_t* labels = nullptr;  // like products
};

// The kernel makes the labels of queries and keys: it labels blocks by the products of their means. Value, score and
// lists of AttentionParams have no part in it, and of the scale only the sign.
struct BlockMapParams : AttentionParams {
  bool smooth_k = false;  // subtract the mean key from the keys first
  BlockShares shares;
  std::int8_t* labels = nullptr;  // [batch, heads_q, query blocks, key blocks] of the longest sequences
};

// The kernel lists the blocks of keys that are critical to each block of queries, a row of labels, or, transposed, the
// blocks of queries that each block of keys is critical to. Both are ascending. Entries that are not in use are not
// written.
struct CriticalBlocksParams {
  std::int64_t heads = 0;  // of the whole batch, those with labels of their own
  std::int64_t query_blocks = 0, key_blocks = 0;
  const std::int8_t* labels = nullptr;  // [heads, query blocks, key blocks]
  bool transposed = false;
  std::int64_t width = 0;           // no list is longer
  std::int32_t* counts = nullptr;   // [heads, query blocks], or [heads, key blocks] where transposed
  std::int32_t* indices = nullptr;  // like counts, [..., width]
};

}  // namespace attnx
