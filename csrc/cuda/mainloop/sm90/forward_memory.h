// This lays out the shared memory of a forward block and its barriers. These arrive at them: at query_full the
// producers, as their storage says, and the bytes of Q; at query_empty a lane of each consumer warp; at key_full and
// value_full, by stage, the producers and the bytes; at key_empty and value_empty, by stage, a lane of each consumer
// warp. query_full and query_empty also guard the number of the tile of rows, and key_full and key_empty guard what is
// known of a tile that comes from memory.
#pragma once

#include "cuda/common/ptx_sm90.h"
#include "cuda/mainloop/sm90/swizzled_tile.h"

namespace attnx::cuda {

// A ring of stages has the stage where it stands, and the parity of the phase there.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// This gives the addresses of the parts.
template <class Tile>
struct ForwardMemory {
  using QueryTile = SwizzledTile<Tile::kM, Tile::kHeadDim>;
  using KeyTile = SwizzledTile<Tile::kN, Tile::kHeadDim>;
  static constexpr int kStages = Tile::kStages;

  std::uint32_t query;

  __device__ __forceinline__ std::uint32_t key(int stage) const {
    return query + QueryTile::kBytes + stage * KeyTile::kBytes;
  }
  __device__ __forceinline__ std::uint32_t value(int stage) const { return key(kStages + stage); }
  __device__ __forceinline__ std::uint32_t output() const { return Tile::kOutputOverQuery ? query : key(2 * kStages); }
  __device__ __forceinline__ std::uint32_t query_full() const {
    return key(2 * kStages) + (Tile::kOutputOverQuery ? 0 : QueryTile::kBytes);
  }
  __device__ __forceinline__ std::uint32_t query_empty() const { return query_full() + 8; }
  __device__ __forceinline__ std::uint32_t key_full(int stage) const { return query_full() + 16 + stage * 8; }
  __device__ __forceinline__ std::uint32_t key_empty(int stage) const { return key_full(kStages + stage); }
  __device__ __forceinline__ std::uint32_t value_full(int stage) const { return key_full(2 * kStages + stage); }
  __device__ __forceinline__ std::uint32_t value_empty(int stage) const { return key_full(3 * kStages + stage); }
  // These hold the number of the tile of rows; for several producers in turn, the number of the next one; and of a tile
  // of keys that comes from memory the first key, the bias and the divisor.
  __device__ __forceinline__ std::uint32_t row_tile() const { return key_full(4 * kStages); }
  __device__ __forceinline__ std::uint32_t next_row_tile(int turn) const { return row_tile() + 4 + turn * 4; }
  __device__ __forceinline__ std::uint32_t key_tile(int stage) const { return row_tile() + 16 + stage * 16; }
  static_assert((16 + 4 * kStages * 8) % 16 == 0 && 16 + 4 * kStages * 8 + 16 + kStages * 16 <= Tile::kBarrierBytes);

  template <int kArrivals>
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kConsumers = Tile::kWarpgroups * 4;
    init_barrier(query_full(), kArrivals);
    init_barrier(query_empty(), kConsumers);
    for (int s = 0; s < kStages; ++s) {
      init_barrier(key_full(s), kArrivals);
      init_barrier(key_empty(s), kConsumers);
      init_barrier(value_full(s), kArrivals);
      init_barrier(value_empty(s), kConsumers);
    }
  }
};

}  // namespace attnx::cuda
