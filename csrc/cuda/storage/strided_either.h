// This moves rows that may or may not be aligned: one kernel serves both, and asks for each tile.
#pragma once

#include "cuda/storage/strided.h"

namespace attnx::cuda {

// This is a storage policy of loops that only load.
template <class Input>
struct StridedEither : Strided<Input, false> {
  template <class Tile, int kThreads>
  static __device__ __forceinline__ void load(std::uint32_t tile, const StridedRows<const Input>& rows, int row,
                                              int end, int features, NothingAhead) {
    const bool aligned = (reinterpret_cast<std::uintptr_t>(rows.first) % 16 | rows.row_stride % 8 | features % 8) == 0;
    if (aligned) {
      load_tile<true, Tile, kThreads>(tile, rows, row, end, features);
    } else {
      load_tile<false, Tile, kThreads>(tile, rows, row, end, features);
    }
  }
};

}  // namespace attnx::cuda
