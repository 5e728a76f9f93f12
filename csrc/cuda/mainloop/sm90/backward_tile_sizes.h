// This is the table to tune: tile sizes of the backward for sm_90a by head dimension. It is plain C++, because the
// launchers compute with it too.
//
// A warpgroup of consumers owns 64 keys, and has dK and dV of them in registers beside S and dP of kM rows. Where the
// work is shared by product, two have the same 64 keys, one with dV and S, the other with dK and dP. dQ of the tile, in
// parts of kGradQueryRows rows and kGradQueryFeatures features, is shared out among the warpgroups. It is computed
// transposed where the rows are no multiple of the 64 that wgmma makes.
#pragma once

#include "cuda/mainloop/sm90/tile_sizes.h"

namespace attnx::cuda {

template <int kHeadDim_, int kM_, int kN_, int kBlocksPerSm_, bool kByProduct_ = false,
          int kGradQueryFeatures_ = kByProduct_ ? kHeadDim_ / 2 : 64>
struct TmaBackwardTile {
  static constexpr int kHeadDim = kHeadDim_, kM = kM_, kN = kN_;  // features, rows, keys
  static constexpr bool kByProduct = kByProduct_;
  static constexpr int kWarpgroups = kByProduct ? 2 : kN / 64;
  static constexpr int kConsumers = kWarpgroups * 128, kThreads = 128 + kConsumers;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kStages = 2;  // copies of queries and output gradients in shared memory
  static constexpr int kLogitStages = kWarpgroups == 1 ? 1 : 2;  // copies of dS, which warpgroups read of each other
  static constexpr int kDerivativeBytes = kByProduct ? kM * kN * 4 : 0;
  static constexpr int kLogitColumns = (kM + 63) / 64 * 64;  // columns of dS^T in shared memory, whose panels have 64
  static constexpr bool kSwapGradQuery = kM % 64 != 0;
  static constexpr int kGradQueryRows = kSwapGradQuery ? kM : 64, kGradQueryFeatures = kGradQueryFeatures_;
  // These are the columns of dQ's accumulators, and how many parts of dQ a warpgroup has.
  static constexpr int kGradQueryColumns = kSwapGradQuery ? kGradQueryRows : kGradQueryFeatures;
  static constexpr int kGradQueryParts = (kM / kGradQueryRows) * (kHeadDim / kGradQueryFeatures) / kWarpgroups;
  // The weights must leave their registers before dQ starts where the registers do not hold both.
  static constexpr bool kWaitForWeights = kGradQueryParts > 1 || kM > 64 && kHeadDim > 64;
  static constexpr int first_row(int part) { return part % (kM / kGradQueryRows) * kGradQueryRows; }
  static constexpr int first_feature(int part) { return part / (kM / kGradQueryRows) * kGradQueryFeatures; }
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 24 : 40;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 240 : 512 / kBlocksPerSm - kProducerRegisters;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kSharedBytes = (2 * kN + 2 * kStages * kM) * kHeadDim * 2 +
                                      kLogitStages * kLogitColumns * kN * 2 + kDerivativeBytes + kStages * kM * 8 +
                                      kBarrierBytes;
  static_assert(kSharedBytes * kBlocksPerSm + (kBlocksPerSm - 1) * 1024 <= kMostSharedBytes);
};

// Producers who gather rows need more registers, which two warpgroups of consumers spare.
template <class Tile, int kProducerRegisters_>
struct GatherBackwardTile : Tile {
  static constexpr int kProducerRegisters = kProducerRegisters_, kConsumerRegisters = 252 - kProducerRegisters / 2;
  static constexpr bool kWaitForWeights = true;  // before dQ, so that the fewer registers hold what is left
  static_assert(Tile::kWarpgroups == 2 && kConsumerRegisters % 8 == 0);
};

// Narrow tiles serve short clusters.
template <int kHeadDim>
struct TmaBackwardTiles;
template <>
struct TmaBackwardTiles<64> {
  using Dense = TmaBackwardTile<64, 128, 128, 1>;
  using Gathered = GatherBackwardTile<Dense, 40>;
  using GatheredNarrow = TmaBackwardTile<64, 64, 64, 2>;
  using Listed = DividingTile<Dense, TmaBackwardTile<64, 64, 64, 2>>;
};
template <>
struct TmaBackwardTiles<128> {
  using Dense = TmaBackwardTile<128, 80, 128, 1>;
  using Gathered = GatherBackwardTile<TmaBackwardTile<128, 64, 128, 1>, 40>;
  using GatheredNarrow = GatherBackwardTile<TmaBackwardTile<128, 64, 64, 1, true>, 40>;
  using Listed = DividingTile<TmaBackwardTile<128, 64, 128, 1>, TmaBackwardTile<128, 64, 64, 1, true>>;
};
template <>
struct TmaBackwardTiles<256> {
  using Dense = TmaBackwardTile<256, 64, 64, 1, true>;
  using Gathered = GatherBackwardTile<TmaBackwardTile<256, 64, 64, 1, true, 64>, 56>;
  using GatheredNarrow = Gathered;
  using Listed = DividingTile<Dense>;
};

}  // namespace attnx::cuda
