// These are the rows of the sequences of an entry of the batch.
#pragma once

#include "attnx/params.h"

namespace attnx::cuda {

struct RowRange {
  int begin, end;
};
__device__ __forceinline__ RowRange rows_of_sequence(const SequenceRows& sequences, std::int64_t batch, int sequence,
                                                     int length) {
  if (!sequences.starts) return {0, length};
  const std::int64_t i = batch * sequences.count + sequence;
  return {sequences.starts[i], sequences.ends[i]};
}

// This returns which sequence has the row, or -1.
__device__ __forceinline__ int sequence_of(const SequenceRows& sequences, std::int64_t batch, std::int64_t row) {
  if (!sequences.starts) return 0;
  const std::int32_t* starts = sequences.starts + batch * sequences.count;
  int low = 0, high = int(sequences.count);  // those before low start at the row or before it, from high on behind
  while (low < high) {
    const int middle = (low + high) / 2;
    if (starts[middle] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > 0 && row < sequences.ends[batch * sequences.count + low - 1] ? low - 1 : -1;
}

}  // namespace attnx::cuda
