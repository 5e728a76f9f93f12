// This finds the numbers of a row (sums_arguments.h).
#pragma once

#include "cuda/common/sequence.h"
#include "cuda/mainloop/sums_arguments.h"

namespace attnx::cuda {

// This returns the place of the first row of a sequence and query head. The next row's is `layout.group` places on.
__device__ __forceinline__ std::int64_t first_number_of(const RowNumbers& rows, int batch, const Sequence& sequence,
                                                        int query_head) {
  const int head = rows.layout.group.divide(query_head);
  const std::int64_t tile =
      head * rows.layout.row_tiles + row_tile_of(rows.layout, batch, sequence, 0, rows.rows_of_tile);
  return tile * rows.rows_of_tile + query_head - head * rows.layout.group.divisor();
}

}  // namespace attnx::cuda
