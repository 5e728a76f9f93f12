// What the map of sparse-linear attention ranks blocks by.
#pragma once

#include "attnx/params.h"

namespace attnx::cpu {

// The kernel multiplies the mean of each block of queries with those of all blocks of keys of its sequence, and hands
// out the products row by row. Value, score and lists of AttentionParams have no part in it, and of the scale only the
// sign.
struct BlockProductsParams : AttentionParams {
  bool smooth_k = false;  // subtract the mean key from the keys first

  // A row of products, in the type of sums, which the receiver has to itself as it has the scratch memory.
  struct Row {
    std::int64_t batch, head, block;  // of queries
    std::int64_t length_q, length_k;  // of its sequence
    const void* products;
    void* scratch;
  };
  std::int64_t scratch_bytes = 0;
  void (*receive)(const void* receiver, const Row& row) = nullptr;  // threads call it at the same time
  const void* receiver = nullptr;
};

}  // namespace attnx::cpu
