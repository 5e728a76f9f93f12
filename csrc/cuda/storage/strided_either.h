// This moves rows that may or may not be aligned: one kernel serves both, and asks for each tile.
#pragma once

#include "cuda/storage/strided.h"

namespace attnx::cuda {

// These tell whether chunks of 16 bytes of these rows lie on their size.
template <class Element>
__device__ __forceinline__ bool on_chunks(const StridedRows<Element>& rows, int features) {
  return (reinterpret_cast<std::uintptr_t>(rows.first) % 16 | rows.row_stride % 8 | features % 8) == 0;
}
template <class Element>
__device__ __forceinline__ bool on_chunks(const GroupedRows<Element>& rows, int features) {
  return on_chunks(StridedRows<Element>{rows.first, rows.row_stride}, features) && rows.head_stride % 8 == 0;
}

// This is the storage policy.
template <class Input>
struct StridedEither : Strided<Input, false> {
  template <class Tile, int kThreads, class Rows>
  static __device__ __forceinline__ void load(std::uint32_t tile, const Rows& rows, int row, int end, int features,
                                              NothingAhead) {
    if (on_chunks(rows, features)) {
      load_tile<true, Tile, kThreads>(tile, rows, row, end, features);
    } else {
      load_tile<false, Tile, kThreads>(tile, rows, row, end, features);
    }
  }
  template <class Tile, int kRows, int kThreads, class Rows>
  static __device__ __forceinline__ void store(std::uint32_t tile, int begin, const Rows& rows, int row, int end,
                                               int features, int thread) {
    if (on_chunks(rows, features)) {
      store_tile<true, Tile, kRows, kThreads>(tile, begin, rows, row, end, features, thread);
    } else {
      store_tile<false, Tile, kRows, kThreads>(tile, begin, rows, row, end, features, thread);
    }
  }
};

}  // namespace attnx::cuda
