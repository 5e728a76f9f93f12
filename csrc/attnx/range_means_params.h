// Kernels that pool rows are told these.
#pragma once

#include "attnx/params.h"

namespace attnx {

// The kernel takes the mean of the rows of each range, and how far they are from it, on average, feature by feature. A
// range is a block of so many rows, of which the last may be shorter, or a pair of numbers: the first row, and one past
// the last. A range without rows gives 0.
struct RangeMeansParams {
  DType dtype = DType::kFloat32;
  std::int64_t batch = 0, heads = 0, length = 0, dim = 0;
  Tensor rows;                           // [batch, heads, length, dim]
  std::int64_t count = 0;                // of ranges
  std::int64_t block = 0;                // 0: ranges are given
  const std::int32_t* ranges = nullptr;  // [batch, count, 2]
  std::int64_t ranges_batch_stride = 0;  // 0 where they serve all sequences
  void* means = nullptr;                 // [batch, heads, count, dim] in the type of sums
  void* deviations = nullptr;            // likewise; null where they are not wanted
};

}  // namespace attnx
