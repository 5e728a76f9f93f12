// This moves rows that lists of indices pick out of strided tensors, the clusters of routing attention, to tiles in
// shared memory. What is made for each slot of a cluster lies in the order of the slots.
#pragma once

#include <type_traits>

#include "cuda/storage/gathered_tensors.h"
#include "cuda/storage/strided.h"
#include "cuda/tiles/clustered.h"

namespace attnx::cuda {

// These are the places of one cluster.
template <class Element>
struct KeyPlaceRows {
  Element *own, *memory;  // own counts behind the rows of the memory
  std::int64_t own_stride, memory_stride;
  int memory_rows;

  __device__ __forceinline__ Element* at(int row) const {
    return row < memory_rows ? memory + row * memory_stride : own + row * own_stride;
  }
};

// These are the rows of one cluster.
template <class Element>
struct GatheredRows {
  Element *own, *memory;
  std::int64_t own_stride, memory_stride;
  const std::int32_t* indices;  // of the cluster's own rows, counted behind those of the memory
  int memory_rows;

  // This returns the row's number among those of the memory, or of the tensor.
  __device__ __forceinline__ int index(int row) const { return row < memory_rows ? row : __ldg(indices + row); }
  __device__ __forceinline__ Element* at(int row, int index) const {
    return row < memory_rows ? memory + index * memory_stride : own + index * own_stride;
  }
  __device__ __forceinline__ Element* at(int row) const { return at(row, index(row)); }
};

template <class Element>
__device__ __forceinline__ GatheredRows<Element> fresh(GatheredRows<Element> rows) {
  rows.own = fresh(rows.own);
  return rows;
}

// There are no indices beyond the last row.
template <class Element>
struct ClampedRows {
  GatheredRows<Element> rows;
  int last;

  __device__ __forceinline__ Element* at(int row) const { return rows.at(row < last ? row : last); }
};

// Of a tile of rows, these are what one of kThreads threads copies. They are read before the copies start, and serve
// every tensor that is gathered alike.
template <class Tile, int kThreads>
struct TileIndices {
  static constexpr int kLanes = Tile::kLanes, kRowStep = Chunks<Tile, kThreads>::kRowStep;
  static constexpr int kCount = Tile::kRows / kRowStep;

  int rows;             // from the thread's first one to the end of the cluster
  int indices[kCount];  // in the tensor, or the complements of those in the memory

  TileIndices() = default;
  // Behind the end, where nothing will be read, they are any.
  template <class Element>
  __device__ __forceinline__ TileIndices(const GatheredRows<Element>& all, int row, int end) {
    row += fresh(threadIdx.x) / kLanes;
    rows = end - row;
    const int own = row - all.memory_rows, own_end = end - all.memory_rows;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      indices[i] = ~(row + i * kRowStep);
      load_global(indices[i], all.indices + row + i * kRowStep, unsigned(own + i * kRowStep) < unsigned(own_end));
    }
  }

  // This starts the copies to the tile; what it has beyond the rows and their features becomes 0.
  template <class Element>
  __device__ __forceinline__ void load(std::uint32_t tile, const GatheredRows<Element>& all, int features) const {
    const int thread = fresh(threadIdx.x), in_tile = thread / kLanes, lane = thread % kLanes;
    // Rows are fewer than 2^31 bytes apart.
    const int own_stride = int(all.own_stride) * sizeof(Element),
              memory_stride = int(all.memory_stride) * sizeof(Element);
    const Element* const own = all.own + lane * 8;
    const Element* const memory = at_stride(all.memory + lane * 8, -1, memory_stride);
    // Rows that are swizzled alike are reached from one address.
    constexpr bool kAlike = kRowStep % 8 == 0;
    if constexpr (kAlike) tile += Tile::offset(in_tile, lane);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool remembered = indices[i] < 0;
      const Element* const from =
          at_stride(remembered ? memory : own, indices[i], remembered ? -memory_stride : own_stride);
#pragma unroll
      for (int c = 0; c < Tile::kChunks; c += kLanes)
        copy_async(tile + (kAlike ? Tile::offset(i * kRowStep, c) : Tile::offset(in_tile + i * kRowStep, lane + c)),
                   from + c * 8, i * kRowStep < ((lane + c) * 8 < features ? rows : 0));
    }
  }
};

// This is the storage policy. Rows that are not kAligned need not lie on 16 bytes, nor near each other.
template <class Input_, bool kAligned>
struct Gathered {
  using Input = Input_;

  struct ForwardTensors {
    GatheredTensor query, key, value;
    Tensor output;  // by slot, on 16 bytes
  };

  struct BackwardTensors {
    GatheredTensor query, key, value, grad_output;
    KeyPlaces grad_key, grad_value;  // on 16 bytes
  };

  template <class Element>
  static __device__ __forceinline__ GatheredRows<Element> rows_of_cluster(const GatheredTensor& x, int batch, int head,
                                                                          std::int64_t first) {
    const int head_of_rows = x.group.divide(head);
    return {rows_of<Element>(x.own, batch, head_of_rows, 0),
            rows_of<Element>(x.memory, 0, head_of_rows, 0),
            x.own.row_stride,
            x.memory.row_stride,
            x.indices + (batch * x.heads + head) * x.slots + first - x.memory_rows,
            x.memory_rows};
  }

  template <class Element, class Args>
  static __device__ __forceinline__ GatheredRows<Element> query_rows(const Args&, const GatheredTensor& x, int batch,
                                                                     int head, const ClusterSequence& sequence) {
    return rows_of_cluster<Element>(x, batch, head, sequence.first_q);
  }
  template <class Element, class Args>
  static __device__ __forceinline__ StridedRows<Element> query_rows(const Args&, const Tensor& x, int batch, int head,
                                                                    const ClusterSequence& sequence) {
    return {rows_of<Element>(x, batch, head, sequence.first_q), x.row_stride};
  }
  template <class Element>
  static __device__ __forceinline__ GatheredRows<Element> key_rows(const GatheredTensor& x, int batch, int head,
                                                                   const ClusterSequence& sequence) {
    return rows_of_cluster<Element>(x, batch, head, sequence.first_k);
  }

  template <class Element>
  static __device__ __forceinline__ KeyPlaceRows<Element> key_rows(const KeyPlaces& x, int batch, int head,
                                                                   const ClusterSequence& sequence) {
    return {rows_of<Element>(x.own, batch, head, sequence.first_k - x.memory_rows),
            rows_of<Element>(x.memory, batch, head, std::int64_t(sequence.cluster) * x.memory_rows), x.own.row_stride,
            x.memory.row_stride, x.memory_rows};
  }

  // This is what is read of a tile's rows before load() copies them, for all that are gathered alike.
  template <class Tile, int kThreads>
  using Ahead = std::conditional_t<kAligned, TileIndices<Tile, kThreads>, NothingAhead>;

  template <class Tile, int kThreads, class Rows>
  static __device__ __forceinline__ void load(std::uint32_t tile, const Rows& rows, int row, int end, int features,
                                              const Ahead<Tile, kThreads>& ahead) {
    if constexpr (kAligned) {
      ahead.load(tile, rows, features);
    } else {
      load_tile<false, Tile, kThreads>(tile, ClampedRows{rows, end - 1}, row, end, features);
    }
  }
  template <class Tile, int kRows, int kThreads, class Rows>
  static __device__ __forceinline__ void store(std::uint32_t tile, int begin, const Rows& rows, int row, int end,
                                               int features, int thread) {
    store_tile<true, Tile, kRows, kThreads>(tile, begin, rows, row, end, features, thread);
  }
};

}  // namespace attnx::cuda
