// This is the table to tune: tile sizes by head dimension. It is plain C++, because the launchers compute with it too.
//
// Wide tiles serve long queries on devices that have the shared memory, and lists whose blocks they divide. Narrow ones
// serve the rest: short queries, devices of 99 KiB (sm_86, sm_89, sm_120), lists of smaller blocks, and backward those
// of dimensions whose wide tiles leave lists no registers. With 32 rows a warp a product reads half the shared memory
// that 16 rows need; above 128 features 32 rows exceed the registers.
#pragma once

#include "cuda/mainloop/dividing_tile.h"

namespace attnx::cuda {

inline constexpr int kLeastSharedBytes = 99 * 1024;  // what a block can have on every device since sm_80

template <int kHeadDim_, int kM_, int kN_, int kWarps_, int kStages_, int kBlocksPerSm_>
struct ForwardTile {
  static constexpr int kHeadDim = kHeadDim_, kM = kM_, kN = kN_;  // features, rows, keys
  static constexpr int kWarps = kWarps_, kThreads = kWarps * 32, kWarpRows = kM / kWarps;
  static constexpr int kStages = kStages_;  // copies of keys and values in shared memory
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  // With few features to multiply, special functions would take as long as the tensor cores.
  static constexpr bool kSparesSpecialFunctions = kHeadDim <= 64;
  static constexpr int kSharedBytes = (kM + 2 * kStages * kN) * kHeadDim * 2;
};

template <int kHeadDim>
struct ForwardTiles;
template <>
struct ForwardTiles<32> {
  using Wide = ForwardTile<32, 128, 64, 4, 2, 3>;
  using WideListed = Wide;
  using Narrow = ForwardTile<32, 64, 64, 4, 2, 4>;
};
template <>
struct ForwardTiles<64> {
  using Wide = ForwardTile<64, 128, 96, 4, 1, 2>;
  using WideListed = ForwardTile<64, 128, 64, 4, 2, 2>;
  using Narrow = ForwardTile<64, 64, 64, 4, 2, 3>;
};
template <>
struct ForwardTiles<96> {
  using Wide = ForwardTile<96, 128, 64, 4, 1, 2>;
  using WideListed = Wide;
  using Narrow = ForwardTile<96, 64, 64, 4, 2, 3>;
};
template <>
struct ForwardTiles<128> {
  using Wide = ForwardTile<128, 128, 64, 4, 1, 2>;
  using WideListed = Wide;
  using Narrow = ForwardTile<128, 64, 64, 4, 1, 2>;
};
template <>
struct ForwardTiles<192> {
  using Narrow = ForwardTile<192, 64, 64, 4, 1, 2>;
  using Wide = Narrow;
  using WideListed = Narrow;
};
template <>
struct ForwardTiles<256> {
  using Narrow = ForwardTile<256, 64, 32, 4, 2, 2>;
  using Wide = Narrow;
  using WideListed = Narrow;
};

// These are the tiles of calls with terms in their logits. Lists have one size alone.
template <int kHeadDim>
struct TermsForwardTiles;
template <>
struct TermsForwardTiles<64> {
  using Wide = ForwardTile<64, 128, 64, 4, 2, 2>;
  using Narrow = ForwardTiles<64>::Narrow;
  using WideListed = Narrow;
};
template <>
struct TermsForwardTiles<128> {
  using Wide = ForwardTile<128, 128, 32, 4, 2, 2>;
  using Narrow = ForwardTiles<128>::Narrow;
  using WideListed = Narrow;
};
template <>
struct TermsForwardTiles<256> {
  using Narrow = ForwardTiles<256>::Narrow;
  using Wide = Narrow;
  using WideListed = Narrow;
};

// S and dP are rows x keys, dK and dV are keys x features, and dQ is rows x features; the warps stand along both.
template <int kHeadDim_, int kM_, int kN_, int kWarps_, int kStages_, int kScoreWarps_, int kKeyWarps_, int kRowWarps_>
struct BackwardTile {
  static constexpr int kHeadDim = kHeadDim_, kM = kM_, kN = kN_;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * 32;
  static constexpr int kStages = kStages_;  // copies of queries and output gradients in shared memory
  static constexpr int kScoreWarps = kScoreWarps_, kScoreWarpsN = kWarps / kScoreWarps;  // of S: along rows, along keys
  static constexpr int kKeyWarps = kKeyWarps_, kKeyWarpsD = kWarps / kKeyWarps;  // of dK: along keys, along features
  static constexpr int kRowWarps = kRowWarps_, kRowWarpsD = kWarps / kRowWarps;  // of dQ: along rows, along features
  static constexpr int kSharedBytes = (2 * kStages * kM + 2 * kN) * kHeadDim * 2 + 2 * kM * kN * 2;
};

template <int kHeadDim>
struct BackwardTiles;
template <>
struct BackwardTiles<32> {
  using Wide = BackwardTile<32, 128, 64, 8, 2, 4, 4, 8>;
  using Narrow = BackwardTile<32, 64, 64, 4, 2, 2, 2, 4>;
  using WideListed = Wide;
};
template <>
struct BackwardTiles<64> {
  using Wide = BackwardTile<64, 128, 128, 8, 2, 4, 4, 4>;
  using Narrow = BackwardTile<64, 64, 64, 8, 2, 4, 4, 4>;
  using WideListed = Wide;
};
template <>
struct BackwardTiles<96> {
  using Wide = BackwardTile<96, 64, 128, 8, 2, 2, 4, 4>;
  using Narrow = BackwardTile<96, 64, 64, 8, 2, 4, 4, 4>;
  using WideListed = Narrow;
};
template <>
struct BackwardTiles<128> {
  using Wide = BackwardTile<128, 64, 128, 8, 2, 2, 4, 2>;
  using Narrow = BackwardTile<128, 64, 64, 8, 1, 4, 4, 2>;
  using WideListed = Wide;
};
template <>
struct BackwardTiles<192> {
  using Wide = BackwardTile<192, 64, 64, 8, 2, 4, 4, 2>;
  using Narrow = BackwardTile<192, 32, 64, 8, 1, 2, 4, 2>;
  using WideListed = Narrow;
};
template <>
struct BackwardTiles<256> {
  using Wide = BackwardTile<256, 64, 64, 8, 1, 4, 4, 4>;
  using Narrow = BackwardTile<256, 32, 32, 4, 1, 2, 2, 2>;
  using WideListed = Narrow;
};

// Sums over scores have no product behind S and dP, so that warps stand along its rows and keys. In shared memory are
// so many tiles of rows and of keys: where they change from step to step, there may be two stages.
template <int kHeadDim_, int kM_, int kN_, int kRowWarps_, int kKeyWarps_, int kStages_, int kRowTiles, int kKeyTiles,
          int kBlocksPerSm_>
struct SumsTile {
  static constexpr int kHeadDim = kHeadDim_, kM = kM_, kN = kN_, kStages = kStages_;
  static constexpr int kRowWarps = kRowWarps_, kKeyWarps = kKeyWarps_, kThreads = kRowWarps * kKeyWarps * 32;
  static constexpr int kWarpRows = kM / kRowWarps, kWarpKeys = kN / kKeyWarps;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kSharedBytes = (kRowTiles * kM + kKeyTiles * kN) * kHeadDim * 2;
  static_assert(kWarpRows % 16 == 0 && kWarpKeys % 16 == 0 && kSharedBytes <= kLeastSharedBytes);
};

// These are the sizes of GradTerms below.
inline constexpr int kGradTermsKeys = 64;
inline constexpr int grad_terms_rows(int head_dim) { return head_dim <= 128 ? 64 : 32; }

// Grad... are for gradients of logits, which have dO beside Q and V beside K.
template <int kHeadDim>
struct SumsTiles;
template <>
struct SumsTiles<64> {
  using Keys = SumsTile<64, 64, 128, 1, 4, 2, 2, 1, 3>;
  using Pairs = SumsTile<64, 64, 64, 2, 2, 1, 1, 1, 4>;
  using Rows = SumsTile<64, 64, 64, 4, 1, 2, 1, 2, 4>;
  using GradBlocks = SumsTile<64, 64, 64, 2, 2, 1, 2, 2, 3>;
  using GradTerms = SumsTile<64, 64, 64, 1, 4, 1, 2, 2, 3>;
  using GradRows = SumsTile<64, 64, 64, 4, 1, 1, 2, 2, 3>;
};
template <>
struct SumsTiles<128> {
  using Keys = SumsTile<128, 64, 128, 1, 4, 2, 2, 1, 2>;
  using Pairs = SumsTile<128, 64, 64, 2, 2, 1, 1, 1, 4>;
  using Rows = SumsTile<128, 64, 64, 4, 1, 2, 1, 2, 3>;
  using GradBlocks = SumsTile<128, 64, 64, 2, 2, 1, 2, 2, 2>;
  using GradTerms = SumsTile<128, 64, 64, 1, 4, 1, 2, 2, 2>;
  using GradRows = SumsTile<128, 64, 64, 4, 1, 1, 2, 2, 2>;
};
template <>
struct SumsTiles<256> {
  using Keys = SumsTile<256, 64, 64, 1, 4, 2, 2, 1, 1>;
  using Pairs = SumsTile<256, 64, 64, 2, 2, 1, 1, 1, 2>;
  using Rows = SumsTile<256, 64, 64, 4, 1, 2, 1, 2, 1>;
  using GradBlocks = SumsTile<256, 32, 64, 2, 2, 1, 2, 2, 1>;
  using GradTerms = SumsTile<256, 32, 64, 1, 4, 1, 2, 2, 1>;
  using GradRows = SumsTile<256, 32, 64, 2, 1, 1, 2, 2, 1>;
};

// These are for calls with terms in their logits: what the logits leave to the gradients needs the registers of a
// narrow tile.
template <int kHeadDim>
struct TermsBackwardTiles {
  using Narrow = typename BackwardTiles<kHeadDim>::Narrow;
  using Wide = Narrow;
  using WideListed = Narrow;
};

}  // namespace attnx::cuda
