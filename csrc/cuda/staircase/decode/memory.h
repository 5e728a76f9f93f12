// This is the shared memory of a block of decoding.
#pragma once

#include <algorithm>

#include "cuda/staircase/decode/place.h"

namespace attnx::cuda {

// A stage has codes of keys and of values, then ranges of keys and of values. In the tail it has rows as they came.
template <int kBits, int kHeadDim, int kTiles_>
struct DecodeMemory {
  static constexpr int kTiles = kTiles_, kRows = kTiles * kDecodeRows;

  // Ranges of values lie at this distance, so that lanes that read one of eight groups each meet no bank twice.
  static constexpr int kGroup = (kDecodeTokens + 8) * 4, kGroups = kHeadDim / kDecodeTokens;

  // This many bytes have the codes of keys, or of values, of a turn of this many tiles.
  static constexpr int codes(int tiles, int bits) { return tiles * kHeadDim * bits * 4; }
  static constexpr int stage(int tiles, int bits) {
    return 2 * codes(tiles, bits) + tiles * (kHeadDim * 4 + kGroups * kGroup);
  }
  static constexpr int kQuery = kTiles * kHeadDim * kDecodeRows * 2;
  static constexpr int weights(int tiles) { return tiles * kTiles * 512; }
  static constexpr int most_stage(int tiles) { return std::max(stage(tiles, kBits), stage(1, 8)); }
  static constexpr int kStages = most_stage(4) <= 8192 ? 4 : 3;

  // Few rows leave room for three blocks on a multiprocessor of an H100, and all for one on the least one.
  static constexpr int kMost = kTiles <= 2 ? 74 << 10 : 94 << 10;
  static constexpr int total(int tiles) { return kStages * most_stage(tiles) + kQuery + 2 * weights(tiles); }
  static constexpr int kTurnTiles = total(4) <= kMost ? 4 : total(2) <= kMost ? 2 : 1;

  static constexpr int kStage = most_stage(kTurnTiles);
  static constexpr int kWeights = weights(kTurnTiles);

  // These are offsets.
  static constexpr int kScalesAt = 0;                                      // [row] of (multiplier, bias)
  static constexpr int kMaximaAt = kScalesAt + kRows * 8;                  // [2][warp][row]
  static constexpr int kMaxAt = kMaximaAt + 2 * kDecodeWarps * kRows * 4;  // [warp][row]
  static constexpr int kEndsAt = kMaxAt + kDecodeWarps * kRows * 4;        // [row] of tokens
  static constexpr int kRisenAt = kEndsAt + kRows * 4;                     // [2][warp]: whether its maxima have
  static constexpr int kStagesAt = (kRisenAt + 2 * kDecodeWarps * 4 + 127) / 128 * 128;
  static constexpr int kQueryAt = kStagesAt + kStages * kStage;
  static constexpr int kWeightsAt = kQueryAt + kQuery;  // [2][tile of tokens][tile of rows][lane] of 4 words

  // These take the place of stages and what follows in the end.
  static constexpr int kSumsAt = kStagesAt;                                     // [row][head_dim]
  static constexpr int kMiddlesAt = kSumsAt + kRows * kHeadDim * 4;             // [warp][tile of rows][group][8]
  static constexpr int kWeightSumsAt = kMiddlesAt + kDecodeWarps * kRows * 32;  // [warp][row]
  static constexpr int kPartAt = kWeightSumsAt + kDecodeWarps * kRows * 4;      // [row] of (maximum, sum)
  static constexpr int kBytes = std::max(kWeightsAt + 2 * kWeights, kPartAt + kRows * 8);

  template <DecodeKind kKind>
  static constexpr int values_at() {
    return kKind == DecodeKind::kPlain ? codes(kTurnTiles, kBits) : codes(1, 8);
  }
  template <DecodeKind kKind>
  static constexpr int key_ranges_at() {
    return 2 * values_at<kKind>();
  }
  template <DecodeKind kKind>
  static constexpr int value_ranges_at() {
    return key_ranges_at<kKind>() + (kKind == DecodeKind::kPlain ? kTurnTiles : 1) * kHeadDim * 4;
  }
};

}  // namespace attnx::cuda
