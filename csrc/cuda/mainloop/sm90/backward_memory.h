// This lays out the shared memory of a backward block, its barriers, and what passes from the producer to the
// consumers.
//
// These arrive at the barriers: at keys_full, and by stage at query_full and grad_output_full, the producers, as their
// storage says, and the bytes that they announce; at query_empty and grad_output_empty, by stage, a lane of each
// consumer warp; at grad_logits_full, by stage of dS, a lane of each warp that makes it; and, where the work is shared
// by product, at derivative_full and derivative_empty a lane of each warp that writes and reads them. dS needs no
// barrier to be empty: a warp that has seen the next one full knows that all have read this one.
#pragma once

#include "cuda/mainloop/sm90/backward_ptx.h"
#include "cuda/mainloop/sm90/backward_tile_sizes.h"
#include "cuda/mainloop/sm90/swizzled_tile.h"

namespace attnx::cuda {

// This gives the addresses of the parts of the block's shared memory.
template <class Tile>
struct BackwardMemory {
  using KeyTile = SwizzledTile<Tile::kN, Tile::kHeadDim>;
  using RowTile = SwizzledTile<Tile::kM, Tile::kHeadDim>;
  using LogitTile = SwizzledTile<Tile::kN, Tile::kLogitColumns>;  // dS^T
  static constexpr int kStages = Tile::kStages, kLogitStages = Tile::kLogitStages;

  std::uint32_t key;

  __device__ __forceinline__ std::uint32_t value() const { return key + KeyTile::kBytes; }
  __device__ __forceinline__ std::uint32_t query(int stage) const {
    return key + 2 * KeyTile::kBytes + stage * RowTile::kBytes;
  }
  __device__ __forceinline__ std::uint32_t grad_output(int stage) const { return query(kStages + stage); }
  __device__ __forceinline__ std::uint32_t grad_logits(int stage) const {
    return query(2 * kStages) + stage * LogitTile::kBytes;
  }
  // The gradient of each weight is multiplied with this: a float32 of each logit, in the order of a warpgroup's
  // registers.
  __device__ __forceinline__ std::uint32_t derivative() const { return grad_logits(kLogitStages); }
  // These hold a float32 of each row: the first is what its logits get, times log2(e); the second is what the gradients
  // of its weights lose.
  __device__ __forceinline__ std::uint32_t offset(int stage) const {
    return derivative() + Tile::kDerivativeBytes + stage * Tile::kM * 4;
  }
  __device__ __forceinline__ std::uint32_t delta(int stage) const { return offset(kStages + stage); }
  // Here the producer describes a tile of rows (PublishedTile).
  __device__ __forceinline__ std::uint32_t tile(int stage) const { return offset(2 * kStages) + stage * 32; }
  __device__ __forceinline__ std::uint32_t keys_full() const { return tile(kStages); }
  __device__ __forceinline__ std::uint32_t query_full(int stage) const { return keys_full() + 8 + stage * 8; }
  __device__ __forceinline__ std::uint32_t query_empty(int stage) const { return query_full(kStages + stage); }
  __device__ __forceinline__ std::uint32_t grad_output_full(int stage) const { return query_full(2 * kStages + stage); }
  __device__ __forceinline__ std::uint32_t grad_output_empty(int stage) const {
    return query_full(3 * kStages + stage);
  }
  __device__ __forceinline__ std::uint32_t grad_logits_full(int stage) const { return query_full(4 * kStages + stage); }
  __device__ __forceinline__ std::uint32_t derivative_full() const { return grad_logits_full(kLogitStages); }
  __device__ __forceinline__ std::uint32_t derivative_empty() const { return derivative_full() + 8; }
  static_assert(kStages * 32 + 8 + (4 * kStages + kLogitStages + 2) * 8 <= Tile::kBarrierBytes);

  template <int kArrivals>
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kConsumerWarps = Tile::kWarpgroups * 4;
    init_barrier(keys_full(), kArrivals);
    for (int s = 0; s < kStages; ++s) {
      init_barrier(query_full(s), kArrivals);
      init_barrier(query_empty(s), kConsumerWarps);
      init_barrier(grad_output_full(s), kArrivals);
      init_barrier(grad_output_empty(s), kConsumerWarps);
    }
    for (int s = 0; s < kLogitStages; ++s) init_barrier(grad_logits_full(s), Tile::kN / 16);
    if constexpr (Tile::kByProduct) {
      init_barrier(derivative_full(), 4);
      init_barrier(derivative_empty(), 4);
    }
  }
};

// The producer tells this to the consumers of a tile of rows, so that they need not keep in registers where their own
// tile stands.
struct PublishedTile {
  int row;       // the first; -1 after the last tile
  int row_tile;  // where its sums lie
  int before;    // deterministic: how many tiles of keys add to its sums first
  int row_head;
  unsigned masked;  // a bit for each warpgroup: whether logits of its keys must be placed; and kRagged
  float bias;       // of a listed tile, times log2(e)
  float divisor;    // of its weights

  static constexpr unsigned kRagged = 1u << 31;  // other sequences' rows are in the tile

  __device__ __forceinline__ void store(std::uint32_t to) const {
    store_shared(to, make_uint4(row, row_tile, before, row_head));
    store_shared(to + 16, make_uint4(masked, __float_as_uint(bias), __float_as_uint(divisor), 0));
  }
  static __device__ __forceinline__ PublishedTile load(std::uint32_t from) {
    const uint4 x = load_shared(from), y = load_shared(from + 16);
    return {int(x.x), int(x.y), int(x.z), int(x.w), y.x, __uint_as_float(y.y), __uint_as_float(y.z)};
  }
};

// This says where a role stands in the rings.
template <int kStages>
struct Step {
  int number = 0;

  __device__ __forceinline__ int stage() const { return number % kStages; }
  __device__ __forceinline__ std::uint32_t parity() const { return number / kStages & 1; }
};

}  // namespace attnx::cuda
