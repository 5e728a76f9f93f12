// This is a block of decoding. Each warp weighs tiles of tokens of its own, and then sums the values of all tiles in
// channels of its own: codes are unpacked once, whatever the number of rows.
#pragma once

#include "cuda/staircase/decode/keys.h"

namespace attnx::cuda {

template <int kBits, int kHeadDim, int kTiles>
class DecodeBlock : DecodeKeys<kBits, kHeadDim, kTiles> {
  using Keys = DecodeKeys<kBits, kHeadDim, kTiles>;
  using Keys::args_, Keys::place_, Keys::memory_, Keys::stages_, Keys::lane_, Keys::warp_, Keys::dim_, Keys::weights_;
  using Keys::word, Keys::range, Keys::half_cell, Keys::weights, Keys::take, Keys::to_halves, Keys::weigh;
  using typename Keys::Stages;

 public:
  using typename Keys::Memory;

 private:
  static constexpr int kM = kHeadDim == 64 ? 1 : 2;            // of 16 channels that a warp has of a block of values
  static constexpr int kBlocks = std::max(kHeadDim / 128, 1);  // of values that a warp has

  const int first_block_;
  const bool upper_;     // whether the warp has the upper half of a block of values
  bool scaled_ = false;  // whether sums are what they say, or have the units of codes

  // These are sums of channels 16 m + 8 i + g, and, of the tiles that the warp weighed, those of the middles of the
  // lowest cells in group g of channels, and of weights.
  float sums_[kBlocks][kTiles][kM][4] = {}, ends_[kTiles][4] = {};

  template <DecodeKind kKind>
  __device__ __forceinline__ void sum_values(const std::uint32_t (&p)[kTiles][4], const DecodeTurn& turn,
                                             std::uint32_t stage, int tile) {
    constexpr bool kRefined = kKind == DecodeKind::kRefined;
    const int planes = kRefined ? stages_.planes(turn) : 1;
    if (tile == warp_) {
      const int group = min(lane_ / 4, args_.groups - 1);
      const RowRanges ranges(Stages::template value_ranges<kKind>(stage, tile, group) + range(), half_cell(planes));
#pragma unroll
      for (int kk = 0; kk < 2; ++kk) sum_ends(p, ranges.middle[2 * kk], ranges.middle[2 * kk + 1], kk);
    }
    const std::uint32_t codes = stage + Memory::template values_at<kKind>() + tile * dim_ * kBits * 4 + word();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int d = first_block_ + i;
      if (d >= dim_ / 32) break;
      const RowRanges ranges(Stages::template value_ranges<kKind>(stage, tile, args_.group_tiles.divide(d)) + range(),
                             half_cell(planes));
      multiply_block<kBits, kRefined>(sums_[i], codes, d, dim_, planes, upper_,
                                      [&](int n, int f) { return multiply_halves(p[n][f], ranges.step[f]); });
    }
  }

  // Rows 0 to 7 of the products are the groups of channels. Those below have ones, so that their sums are of weights.
  __device__ __forceinline__ void sum_ends(const std::uint32_t (&p)[kTiles][4], std::uint32_t low, std::uint32_t high,
                                           int kk) {
    const std::uint32_t a[4] = {low, power_pair(0), high, power_pair(0)};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) multiply_add(ends_[n], a, p[n][2 * kk], p[n][2 * kk + 1], __half());
  }

  __device__ __forceinline__ void sum_tail(const std::uint32_t (&p)[kTiles][4], std::uint32_t stage) {
    if (warp_ == 0) sum_ends(p, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int tile = 2 * (first_block_ + i) + (kM == 1 ? upper_ : m);
        std::uint32_t a[4];
        load_matrices_transposed(a, tail_chunk<kHeadDim>(stage + Memory::template values_at<DecodeKind::kTail>(),
                                                         lane_ % 8 + lane_ / 16 * 8, 2 * tile + lane_ / 8 % 2));
        to_halves(a);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) multiply_add(sums_[i][n][m], a, p[n][0], p[n][1], __half());
      }
  }

  __device__ __forceinline__ void sum(const DecodeTurn& turn, std::uint32_t stage, int parity) {
    const bool risen = weights_.risen(parity);
    if (risen) rescale(parity, turn.tiles);
    if (turn.kind == DecodeKind::kTail) scale();
#pragma unroll 1
    for (int tile = 0; tile < turn.tiles; ++tile) {
      std::uint32_t p[kTiles][4];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) take(p[n], load_shared(weights(parity, tile, n)));
      if (risen) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const std::uint32_t factor = weights_.factor(parity, turn.tiles, tile, n);
#pragma unroll
          for (std::uint32_t& x : p[n]) x = multiply_halves(x, factor);
        }
      }
      if (turn.kind == DecodeKind::kTail)
        sum_tail(p, stage);
      else if (kBits == 8 || turn.kind == DecodeKind::kPlain)
        sum_values<DecodeKind::kPlain>(p, turn, stage, tile);
      else
        sum_values<DecodeKind::kRefined>(p, turn, stage, tile);
    }
  }

  __device__ __forceinline__ void rescale(int parity, int tiles) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 factor = weights_.raise(parity, tiles, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float own = i % 2 ? factor.y : factor.x;
        ends_[n][i] *= own;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int m = 0; m < kM; ++m) sums_[b][n][m][i] *= own;
      }
    }
  }

  // Sums of codes become sums of numbers, less the middles, before the tail or in the end.
  __device__ __forceinline__ void scale() {
    if (scaled_) return;
    scaled_ = true;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums_[b][n][m][i] *= unit_of<kBits>(2 * m + i / 2);
  }

 public:
  __device__ DecodeBlock(const DecodeArguments& args, const DecodePlace& place, std::uint32_t memory)
      : Keys(args, place, memory), first_block_(kM == 1 ? warp_ / 2 : warp_ * kBlocks), upper_(kM == 1 && warp_ % 2) {}

  // While the values of a turn are summed, and the keys of the next one weighed, others are on their way. One barrier a
  // turn tells that the next one has come, that weights are there, and that a stage is free.
  __device__ __forceinline__ void run() {
    constexpr int kAhead = Memory::kStages - 1;
    const int count = (place_.all_turns - place_.split + place_.blocks - 1) / place_.blocks;
    const auto number = [&](int i) { return place_.split + i * place_.blocks; };
    int stage = 0;  // of turn i + 1
#pragma unroll 1
    for (int i = -kAhead; i < count; ++i) {
      if (i >= 0) {
        wait_copies<kAhead - 2>();
        __syncthreads();
      }
      const int before = stage == 0 ? kAhead : stage - 1, free = before == 0 ? kAhead : before - 1;
      if (i + kAhead < count) stages_.start(number(i + kAhead), i < 0 ? i + kAhead : free);
      commit_copies();
      if (i < -1) continue;
      if (i == -1) {
        leave_rows<Memory, kHeadDim>(args_, place_, memory_);
        weights_.start();
        wait_copies<kAhead - 1>();
        __syncthreads();
      } else {
        sum(place_.turn(number(i)), stages_.at(before), i % 2);
      }
      if (i + 1 < count) weigh(place_.turn(number(i + 1)), stages_.at(stage), (i + 1) % 2);
      stage = stage == kAhead ? 0 : stage + 1;
    }
    scale();
    __syncthreads();
  }

  // Sums of all rows are left in shared memory, where stages were, with maxima and sums of weights.
  __device__ __forceinline__ void leave(float* memory) const {
    float* const sums = memory + Memory::kSumsAt / 4;
    float* const middles = memory + Memory::kMiddlesAt / 4;
    float* const weight_sums = memory + Memory::kWeightSumsAt / 4;
    float2* const part = reinterpret_cast<float2*>(memory + Memory::kPartAt / 4);
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        middles[((warp_ * kTiles + n) * 8 + g) * 8 + 2 * t + c] = ends_[n][c];
        if (g == 0) weight_sums[warp_ * Memory::kRows + n * 8 + 2 * t + c] = ends_[n][2 + c];
      }
    __syncthreads();
#pragma unroll 1
    for (int row = threadIdx.x; row < Memory::kRows; row += kDecodeWarps * 32) {
      float sum = 0;
      for (int w = 0; w < kDecodeWarps; ++w) sum += weight_sums[w * Memory::kRows + row];
      part[row] = make_float2(memory[Memory::kMaxAt / 4 + row], sum);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (first_block_ + b >= dim_ / 32) break;
      const int group = args_.group_tiles.divide(first_block_ + b);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int row = n * 8 + 2 * t + c;
          float middle = 0;
#pragma unroll
          for (int w = 0; w < kDecodeWarps; ++w) middle += middles[((w * kTiles + n) * 8 + group) * 8 + 2 * t + c];
          float* const to = sums + row * dim_ + (first_block_ + b) * 32 + (upper_ ? 16 : 0) + g;
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) to[16 * m + 8 * i] = sums_[b][n][m][2 * i + c] + middle;
        }
    }
    __syncthreads();
  }
};

}  // namespace attnx::cuda
