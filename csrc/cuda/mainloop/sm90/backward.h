// This is the backward mainloop for sm_90a: it makes dK and dV of a tile of keys, and the tile's part of dQ, by wgmma
// on tiles that TMA brings (FlashAttention-3, Shah et al. 2024), or that the producers gather.
//
// A block owns a tile of keys and walks over the tiles of rows (query, head of the group) that see it. Its first
// warpgroup, the producers, has copies made: K and V once, Q and dO in rings of two stages. The others are consumers.
// They compute transposed: S^T and dP^T come out of the tensor cores as the next products want their operand A, so that
// P never passes through shared memory. dQ sums over all keys of the tile, and is the only product whose operand does.
// It is summed in global memory in float32, four sums of a thread at a time, in the order of the threads' registers; a
// last pass scales the sums, rounds them and puts them in place. In a deterministic backward the tiles of keys add in
// order.
//
// Consumers share the work in one of two ways: by keys (backward_by_keys.h) where dK and dV of 64 keys fit a
// warpgroup's registers, by product (backward_by_product.h) where they do not.
//
// What a row adds to its logits comes from an earlier pass, which reads no tensor for the sigmoid. The sigmoid has no
// delta.
#pragma once

#include "cuda/mainloop/sm90/backward_by_keys.h"
#include "cuda/mainloop/sm90/backward_by_product.h"

namespace attnx::cuda {

template <class Score, class Tiles, class Storage, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    attnx_backward_sm90(const __grid_constant__ BackwardArguments<Tiles, Storage, Plain> args) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  const BackwardMemory<Tile> shared{shared_address(shared_bytes)};
  if (const auto place = BackwardPlace<Tiles, Tile>::again(args); place.key_begin >= place.sequence.band.length_k)
    return;
  if (threadIdx.x == 0) {
    shared.template init_barriers<Storage::kArrivals>();
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the compiler sees that all lanes agree
  if (warpgroup == 0) {
    release_registers_down_to<Tile::kProducerRegisters>();
    if (threadIdx.x < Storage::kProducers) produce_tiles<Score::kNormalised, Tiles, Storage>(args, shared);
  } else {
    claim_registers_up_to<Tile::kConsumerRegisters>();
    const BackwardWarpgroup<Score, Tiles, Storage, Tile> own(args, shared, warpgroup - 1);
    if constexpr (!Tile::kByProduct) {
      consume_by_keys(own);
    } else if (own.number == 0) {
      consume_weights(own);
    } else {
      consume_gradients(own);
    }
  }
}

}  // namespace attnx::cuda
