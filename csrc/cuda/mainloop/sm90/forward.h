// This is the forward mainloop for sm_90a: it uses wgmma on tiles that TMA brings, and its warps have two roles
// (FlashAttention-3, Shah et al. 2024).
//
// A block stays and takes tiles of rows (query, head of the group) from a counter, the longest first. Its first
// warpgroup, the producer, has copies made: Q, and K and V in rings of two stages, V one step behind K. Each other
// warpgroup owns 64 rows and walks over the tiles of keys. A step does this:
//
//   S = Q K^T starts, behind the last step's products | wait for all | place logits, if the tile is not whole | score;
//   and 16 keys at a time: weights are made and packed, O += P V starts
//
// The tensor cores thus multiply the weights of 16 keys while those of the next 16 are made, and the warpgroups'
// products run under each other's scores. A sigmoid needs nothing of S but the element; softmax looks at the row's
// maximum first.
#pragma once

#include "cuda/mainloop/sm90/forward_consumer.h"
#include "cuda/mainloop/sm90/forward_producer.h"

namespace attnx::cuda {

template <class Score, class Tiles, class Storage, class Tile, class Logits>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    attnx_forward_sm90(const __grid_constant__ PersistentForwardArguments<Score, Tiles, Storage, Logits> args) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  const ForwardMemory<Tile> shared{shared_address(shared_bytes)};
  if (threadIdx.x == 0) {
    shared.template init_barriers<Storage::kArrivals>();
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the compiler sees that all lanes agree
  if (warpgroup == 0) {
    release_registers_down_to<Tile::kProducerRegisters>();
    if (threadIdx.x < Storage::kProducers) produce<Tiles, Storage>(args, shared);
  } else {
    claim_registers_up_to<Tile::kConsumerRegisters>();
    consume<Score, Tiles, Storage, Logits>(args, shared, warpgroup - 1);
  }
}

}  // namespace attnx::cuda
