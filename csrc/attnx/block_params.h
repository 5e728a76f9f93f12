// The selections of blocks are told these: sampling, labels of a map, and lists from labels.
#pragma once

#include "attnx/block_sampling.h"
#include "attnx/params.h"

namespace attnx {

// The kernel lists the blocks of keys that one round keeps for each block of queries, ascending. Entries of a row that
// are not in use hold 0.
struct SampleBlocksParams {
  BlockGrid grid;
  std::int64_t heads = 0;              // of the whole batch
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
  DType dtype = DType::kFloat32;        // of products: kFloat32 or kFloat64
  const void* products = nullptr;       // [heads, query blocks, key blocks]
  double critical = 0, negligible = 0;  // shares of the blocks that some query of the row sees
  std::int64_t protect = 0;             // the first keys, whose blocks are critical whatever their products
  std::int8_t* labels = nullptr;        // like products
};

// The kernel lists the critical blocks of each row of labels, ascending. Entries of a row that are not in use are not
// written.
struct CriticalBlocksParams {
  std::int64_t rows = 0, blocks = 0;
  const std::int8_t* labels = nullptr;  // [rows, blocks]
  std::int64_t width = 0;               // no row has more critical blocks
  std::int32_t* counts = nullptr;       // [rows]
  std::int32_t* indices = nullptr;      // [rows, width]
};

}  // namespace attnx
