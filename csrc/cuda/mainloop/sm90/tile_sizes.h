// This is the table to tune: tile sizes of the forward for sm_90a by head dimension. It is plain C++, because the
// launchers compute with it too.
//
// A warpgroup of consumers owns 64 rows. Registers allow three of them with 64 features, else two. Lists whose blocks
// have 64 rows or keys get tiles of that size: one warpgroup to a block, and more blocks to a multiprocessor.
#pragma once

#include "cuda/mainloop/dividing_tile.h"

namespace attnx::cuda {

inline constexpr int kMostSharedBytes = 227 * 1024;  // what a block can have on sm_90

// With kOutputOverQuery the output leaves through the query's shared memory, where there is no room for both.
template <int kHeadDim_, int kM_, int kN_, bool kOutputOverQuery_, int kBlocksPerSm_>
struct TmaForwardTile {
  static constexpr int kHeadDim = kHeadDim_, kM = kM_, kN = kN_;  // features, rows, keys
  static constexpr int kWarpgroups = kM / 64, kThreads = (1 + kWarpgroups) * 128;
  static constexpr bool kOutputOverQuery = kOutputOverQuery_;
  // With 64 features special functions take as long as the tensor cores; with more features nothing is gained by using
  // more of them.
  static constexpr bool kSparesSpecialFunctions = true;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kStages = 2;  // copies of keys and of values in shared memory
  // Four boxes to a tile take the producer more registers.
  static constexpr int kProducerRegisters = kWarpgroups == 3 ? 32 : kHeadDim == 256 ? 56 : 40;
  static constexpr int kConsumerRegisters = kWarpgroups == 3    ? 160
                                            : kWarpgroups == 2  ? (504 - kProducerRegisters) / 2
                                            : kBlocksPerSm == 1 ? 240
                                                                : 512 / kBlocksPerSm - 40;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kSharedBytes =
      ((kOutputOverQuery ? 1 : 2) * kM + 2 * kStages * kN) * kHeadDim * 2 + kBarrierBytes;
  static_assert(kSharedBytes * kBlocksPerSm + (kBlocksPerSm - 1) * 1024 <= kMostSharedBytes);
};

// Producers who gather rows keep their numbers in registers.
template <class Tile>
struct GatherForwardTile : Tile {
  static constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
  static_assert(Tile::kWarpgroups == 2);
};

template <int kHeadDim>
struct TmaForwardTiles;
template <>
struct TmaForwardTiles<64> {
  using Dense = TmaForwardTile<64, 192, 128, false, 1>;
  using Gathered = GatherForwardTile<TmaForwardTile<64, 128, 128, false, 1>>;
  using Listed = DividingTile<TmaForwardTile<64, 128, 128, false, 1>, TmaForwardTile<64, 128, 64, false, 1>,
                              TmaForwardTile<64, 64, 64, false, 2>>;
};
template <>
struct TmaForwardTiles<128> {
  using Dense = TmaForwardTile<128, 128, 128, false, 1>;
  using Gathered = GatherForwardTile<Dense>;
  using Listed = DividingTile<Dense, TmaForwardTile<128, 128, 64, false, 1>, TmaForwardTile<128, 64, 64, false, 2>>;
};
template <>
struct TmaForwardTiles<256> {
  using Dense = TmaForwardTile<256, 128, 64, true, 1>;
  using Gathered = GatherForwardTile<Dense>;
  using Listed = DividingTile<Dense, TmaForwardTile<256, 64, 64, true, 1>>;
};

// These are the tiles of calls with terms in their logits, which take the registers of a third warpgroup and, where
// there are more features or lists, of 64 keys.
template <int kHeadDim>
struct TermsTmaForwardTiles {
  using Dense = TmaForwardTile<kHeadDim, 128, kHeadDim == 64 ? 128 : 64, false, 1>;
  using Listed = DividingTile<TmaForwardTile<kHeadDim, 128, 64, false, 1>, TmaForwardTile<kHeadDim, 64, 64, false, 2>>;
};

}  // namespace attnx::cuda
