// A warpgroup of producers gathers rows for Hopper's mainloops, because its TMA gathers none: this is the storage of
// their loops over clusters.
//
// The producers copy by cp.async, and each arrives at a stage's barrier when its own copies have ended. These are
// writes of the generic proxy, so that a consumer, who sees them once it has waited, puts a fence between them and
// wgmma, which reads by the async proxy. A fence of the producers would have to wait for the copies, and then fewer of
// them would be under way.
#pragma once

#include "cuda/common/ptx_sm90.h"
#include "cuda/storage/gathered.h"

namespace attnx::cuda {

// This is the storage policy, as Tma is. Rows start on 16 bytes and are multiples of them.
template <class Input_>
struct GatheredAsync : Gathered<Input_, true> {
  using Base = Gathered<Input_, true>;
  using Input = Input_;
  // All threads of the producer warpgroup copy. One of them also tells what it has written besides.
  static constexpr int kProducers = 128, kArrivals = kProducers + 1;
  // What a tile has beyond the last row is 0.
  static constexpr bool kReadsOn = false;

  template <class Tile>
  using Rows = TileIndices<Tile, kProducers>;

  template <class Tensors>
  static __device__ __forceinline__ void prepare(const Tensors&) {}

  template <class Tile, class Args>
  static __device__ __forceinline__ Rows<Tile> find_rows(const GatheredTensor& from, const Args&,
                                                         const ClusterSequence& sequence, int batch, int head,
                                                         int row) {
    const auto rows = Base::template rows_of_cluster<const Input>(from, batch, head, sequence.first_q);
    return {rows, row, sequence.length_q};
  }
  template <class Tile, class Args>
  static __device__ __forceinline__ Rows<Tile> find_keys(const GatheredTensor& from, const Args&,
                                                         const ClusterSequence& sequence, int batch, int head,
                                                         int key) {
    const auto rows = Base::template rows_of_cluster<const Input>(from, batch, head, sequence.first_k);
    return {rows, key, sequence.band.length_k};
  }

  static __device__ __forceinline__ void announce(std::uint32_t barrier, int, int other_bytes = 0) {
    if (threadIdx.x == 0) arrive_expecting(barrier, other_bytes);
  }
  static __device__ __forceinline__ void announce_none(std::uint32_t barrier) {
    announce(barrier, 0);
    arrive(barrier);
  }
  template <class Tile, class Args>
  static __device__ __forceinline__ void load_rows(std::uint32_t tile, const GatheredTensor& from, const Args&,
                                                   const ClusterSequence& sequence, int batch, int head,
                                                   const Rows<Tile>& rows, std::uint32_t, std::uint64_t) {
    rows.load(tile, Base::template rows_of_cluster<const Input>(from, batch, head, sequence.first_q), from.features);
  }
  template <class Tile, class Args>
  static __device__ __forceinline__ void load_keys(std::uint32_t tile, const GatheredTensor& from, const Args&,
                                                   const ClusterSequence& sequence, int batch, int head,
                                                   const Rows<Tile>& keys, std::uint32_t, std::uint64_t) {
    keys.load(tile, Base::template rows_of_cluster<const Input>(from, batch, head, sequence.first_k), from.features);
  }
  static __device__ __forceinline__ void finish(std::uint32_t barrier) { arrive_after_copies(barrier); }
  static __device__ __forceinline__ void receive() { fence_async_proxy(); }

  template <class Tile, class Args>
  static __device__ __forceinline__ void store_output(std::uint32_t tile, const Args& args,
                                                      const ClusterSequence& sequence, int batch, int head,
                                                      int warp_row, int row, int row_end, int lane) {
    __syncwarp();
    const auto rows = Base::template query_rows<Input>(args, args.tensors.output, batch, head, sequence);
    store_tile<true, Tile, 16, 32>(tile, warp_row, rows, row, row_end, int(args.value_dim), lane);
  }
};

}  // namespace attnx::cuda
