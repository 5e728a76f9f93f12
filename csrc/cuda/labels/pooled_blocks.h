// These make the means of blocks of queries and keys whose products the map ranks. Each launches one kernel.
#pragma once

#include "attnx/block_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

// The means are [batch, heads, blocks, features] of the longest sequences: rows of head_dim numbers, padded with zeros
// to a multiple of 4. Blocks beyond a shorter sequence are zeros.
struct PooledBlocks {
  Tensor rows;
  const std::int32_t *starts, *ends;  // rows of each sequence; null: all
  std::int64_t heads, length, block;
  std::int64_t blocks;  // of a head
  float sign;           // of the means
  float* means;
};

// The kernel pools queries and keys.
void pool_blocks(const BlockMapParams& params, const PooledBlocks& query, const PooledBlocks& key,
                 const Launch& launch);

// The kernel subtracts the mean key of each sequence from the means of its blocks.
void smooth_blocks(const BlockMapParams& params, const PooledBlocks& key, const Launch& launch);

}  // namespace attnx::cuda
