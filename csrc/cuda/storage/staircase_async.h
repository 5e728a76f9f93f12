// A warpgroup of producers unpacks tiles of a staircase cache for Hopper's mainloop, while the others multiply.
#pragma once

#include "cuda/common/ptx_sm90.h"
#include "cuda/storage/staircase.h"

namespace attnx::cuda {

// This is the storage policy, as Tma is.
template <class Input_>
struct UnpackedAsync : Unpacked<Input_> {
  using Base = Unpacked<Input_>;
  using Input = Input_;
  // Each thread of the producer warpgroup arrives at a stage's barrier when its part of the tile is there.
  static constexpr int kProducers = 128, kArrivals = kProducers;
  // What a tile has beyond the last row is 0.
  static constexpr bool kReadsOn = false;

  // A producer need know no more of a tile than its first row.
  template <class Tile>
  using Rows = int;

  static __device__ __forceinline__ void prepare(const typename Base::ForwardTensors&) {}
  template <class Tile, class Args>
  static __device__ __forceinline__ int find_rows(const Tensor&, const Args&, const Sequence&, int, int, int row) {
    return row;
  }
  template <class Tile, class Args, class Tensor>
  static __device__ __forceinline__ int find_keys(const Tensor&, const Args&, const Sequence&, int, int, int key) {
    return key;
  }

  static __device__ __forceinline__ void announce(std::uint32_t, int) {}
  static __device__ __forceinline__ void announce_none(std::uint32_t barrier) { arrive(barrier); }
  template <class Tile, class Args>
  static __device__ __forceinline__ void load_rows(std::uint32_t tile, const Tensor& from, const Args& args,
                                                   const Sequence& sequence, int batch, int head, int row,
                                                   std::uint32_t, std::uint64_t) {
    const auto rows = Base::template query_rows<const Input>(args, from, batch, query_head_of(args, head), sequence);
    Base::template load<Tile, kProducers>(tile, rows, row, sequence.length_q * args.group.divisor(), int(args.head_dim),
                                          NothingAhead());
  }
  template <class Tile, class Args, StaircaseMatrix kWhich>
  static __device__ __forceinline__ void load_keys(std::uint32_t tile, const StaircaseTensor<kWhich>& from, const Args&,
                                                   const Sequence& sequence, int batch, int head, int key,
                                                   std::uint32_t, std::uint64_t) {
    unpack_tile<Tile, kProducers, Input>(tile, StaircaseRows<kWhich>{from, batch, head}, key, sequence.band.length_k);
  }
  // Copies and stores are of the generic proxy, and wgmma reads by the async one.
  static __device__ __forceinline__ void finish(std::uint32_t barrier) {
    commit_copies();
    wait_copies<0>();
    fence_async_proxy();
    arrive(barrier);
  }
  static __device__ __forceinline__ void receive() {}

  template <class Tile, class Args>
  static __device__ __forceinline__ void store_output(std::uint32_t tile, const Args& args, const Sequence& sequence,
                                                      int batch, int head, int warp_row, int row, int row_end,
                                                      int lane) {
    __syncwarp();
    const auto rows =
        Base::template query_rows<Input>(args, args.tensors.output, batch, query_head_of(args, head), sequence);
    Base::template store<Tile, 16, 32>(tile, warp_row, rows, row, row_end, int(args.value_dim), lane);
  }
};

}  // namespace attnx::cuda
