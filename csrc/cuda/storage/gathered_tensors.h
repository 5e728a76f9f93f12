// This says where gathered rows lie. It is plain data, which the host fills in.
#pragma once

#include "attnx/params.h"
#include "cuda/common/divisor.h"

namespace attnx::cuda {

// These are the rows that every head gathers from a tensor.
struct GatheredTensor {
  Tensor own, memory;           // memory: [heads, row, feature], the rows that each cluster has before its own
  int memory_rows;              // of a cluster
  int features;                 // of a row
  const std::int32_t* indices;  // [batch, heads_q, slots]
  std::int64_t slots, heads;    // heads: heads_q
  Divisor group;                // query heads that share a head of rows
};

// This is what each cluster has for its keys: by slot and, for those of the memory, by cluster.
struct KeyPlaces {
  Tensor own, memory;  // memory: [batch, heads_q, cluster * memory_rows, feature]
  int memory_rows;
};

}  // namespace attnx::cuda
