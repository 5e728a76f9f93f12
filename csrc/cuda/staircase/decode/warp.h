// This is a warp of decoding, with sums of its own: it takes every so many turns of 32 tokens.
#pragma once

#include "cuda/staircase/decode/rows.h"
#include "cuda/staircase/decode/stages.h"

namespace attnx::cuda {

template <int kBits, int kHeadDim>
class DecodeWarp {
  using Memory = DecodeMemory<kBits, kHeadDim>;
  using Stages = DecodeStages<kBits, kHeadDim>;
  static constexpr int kBlocks = kHeadDim / 32;  // of codes, in a turn

  const DecodeArguments& args_;
  const DecodePlace& place_;
  Stages stages_;
  QueryOperand<kHeadDim> query_;
  int lane_, blocks_, first_, step_;  // turns of the warp

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[d][i] *= factor[i % 2];
#pragma unroll
    for (int d = 0; d < kHeadDim / 64; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) middles_[d][i] *= factor[i % 2];
  }

  // Weights become the other operand of the products with values: tokens 8f + 2t and 8f + 2t + 1 of row g.
  template <int kM>
  static __device__ __forceinline__ void to_operand(const float (&s)[kM][4], std::uint32_t (&p)[2 * kM]) {
#pragma unroll
    for (int f = 0; f < 2 * kM; ++f) p[f] = transpose(pack(s[f / 2][f % 2 * 2], s[f / 2][f % 2 * 2 + 1], __half()));
  }

  // These are the lane's words of the further planes that hold a turn's window.
  struct Planes {
    const std::uint32_t* of[3] = {};
    int bits = kBits;  // of all planes

    __device__ __forceinline__ void find(const DecodeArguments& args, const DecodePlace& place, int turn, int which) {
      const StaircaseLayout& layout = args.cache.layout;
      int window = turn;
      const int token = args.window_tiles.split(window) * kDecodeTokens, lane = threadIdx.x % 32;
      bits = kBits;
#pragma unroll
      for (int p = 1; p < StaircaseLayout::kMaxPlanes; ++p) {
        of[p - 1] = nullptr;
        if (p >= layout.planes) continue;
        const std::int64_t slot = place.state.slot(layout, p, window);
        if (slot < 0) continue;
        of[p - 1] = args.cache.codes_of(place.batch, place.head_k, which) + layout.plane[p].offset +
                    slot * layout.window_words(p) + layout.block_offset(p, token, 0) + lane % 4 * 8 + lane / 4;
        bits *= 2;
      }
    }
    __device__ __forceinline__ void advance() {
#pragma unroll
      for (int p = 0; p < 3; ++p)
        if (of[p]) of[p] += (kCodeBlock * kBits) << p;
    }
    __device__ __forceinline__ std::uint32_t half_cell() const { return power_pair(7 - bits); }
  };

  __device__ __forceinline__ std::uint32_t word_of(std::uint32_t codes) const {
    return codes + (lane_ % 4 * 8 + lane_ / 4) * 4;
  }

  template <bool kRefined>
  __device__ __forceinline__ void take(int turn, int stage) {
    float s[2][4] = {}, zero[4] = {};
    Planes planes;
    if constexpr (kRefined) planes.find(args_, place_, turn, kKeyMatrix);
    const std::uint32_t key_ranges = stages_.ranges(stage, kKeyMatrix) + lane_ % 4 * 8;
    const std::uint32_t key_codes = word_of(stages_.codes(stage, kKeyMatrix));
#pragma unroll
    for (int d = 0; d < kBlocks; ++d) {
      if (d >= blocks_) break;
      const RowRanges ranges(key_ranges + d * 128, planes.half_cell());
      const std::uint32_t own[4] = {query_.x[4 * d], query_.x[4 * d + 1], query_.x[4 * d + 2], query_.x[4 * d + 3]};
#pragma unroll
      for (int kk = 0; kk < 2; ++kk) {
        const std::uint32_t a[4] = {ranges.middle[2 * kk], ranges.middle[2 * kk], ranges.middle[2 * kk + 1],
                                    ranges.middle[2 * kk + 1]};
        multiply_add(zero, a, own[2 * kk], own[2 * kk + 1], __half());
      }
      multiply_block<kBits, kRefined>(s, key_codes + d * kBits * 128, planes.of, own, ranges);
      if constexpr (kRefined) planes.advance();
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][i] = fmaf(s[m][i], unit_of<kBits>(2 * m + i / 2), zero[i]);

    float factor[2];
    if (rows.weigh(s, turn * kDecodeTokens, factor)) rescale(factor);
    std::uint32_t p[4];
    to_operand(s, p);

    if constexpr (kRefined) planes.find(args_, place_, turn, kValueMatrix);
    const std::uint32_t value_ranges = stages_.ranges(stage, kValueMatrix) + lane_ % 4 * 8;
    const std::uint32_t value_codes = word_of(stages_.codes(stage, kValueMatrix));
#pragma unroll
    for (int d = 0; d < kBlocks; ++d) {
      if (d >= blocks_) break;
      const RowRanges ranges(value_ranges + args_.group_tiles.divide(d) * 128, planes.half_cell());
      // Middles of channels in even blocks are in the first rows of their sums, those in odd ones in the last rows.
#pragma unroll
      for (int kk = 0; kk < 2; ++kk) {
        const std::uint32_t low = ranges.middle[2 * kk], high = ranges.middle[2 * kk + 1];
        const std::uint32_t a[4] = {d % 2 ? 0 : low, d % 2 ? low : 0, d % 2 ? 0 : high, d % 2 ? high : 0};
        multiply_add(middles_[d / 2], a, p[2 * kk], p[2 * kk + 1], __half());
      }
      multiply_block<kBits, kRefined>(reinterpret_cast<float (&)[2][4]>(sums[2 * d]), value_codes + d * kBits * 128,
                                      planes.of, p, ranges);
      if constexpr (kRefined) planes.advance();
    }
  }

  // The last windows have further planes, which are read where they are.
  __device__ void take_codes() {
    int turn = first_;
#pragma unroll
    for (int stage = 0; stage < Memory::kStages; ++stage) {
      if (turn + stage * step_ < place_.plain_turns) stages_.start(turn + stage * step_, stage);
      commit_copies();
    }
    for (int stage = 0; turn < place_.plain_turns; turn += step_) {
      wait_copies<Memory::kStages - 1>();
      __syncwarp();
      take<false>(turn, stage);
      __syncwarp();
      const int next = turn + Memory::kStages * step_;
      if (next < place_.plain_turns) stages_.start(next, stage);
      commit_copies();
      stage = stage + 1 == Memory::kStages ? 0 : stage + 1;
    }
    for (; turn < place_.code_turns; turn += step_) {
      stages_.start(turn, 0);
      commit_copies();
      wait_copies<0>();
      __syncwarp();
      take<true>(turn, 0);
      __syncwarp();
    }
    // From now on sums are what they say.
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[d][i] = fmaf(sums[d][i], unit_of<kBits>(d % 2 * 2 + i / 2), middles_[d / 4][d / 2 % 2 * 2 + i % 2]);
    first_ = turn;
  }

  // Rows of the tail lie in shared memory as they came, their chunks of 16 bytes swizzled.
  static __device__ __forceinline__ std::uint32_t chunk_of(std::uint32_t rows, int token, int chunk) {
    return rows + token * kHeadDim * 2 + (chunk ^ token % 8) * 16;
  }
  __device__ __forceinline__ void start_tail(std::uint32_t to, int which, int token) const {
    const std::int64_t dim = args_.cache.layout.head_dim;
    const std::uint16_t* const from =
        args_.cache.tail_of<const std::uint16_t>(place_.batch, place_.head_k, which, place_.state.tail());
    for (int i = lane_; i < kTailTokens * kHeadDim / 8; i += 32) {
      const int own = i / (kHeadDim / 8), chunk = i % (kHeadDim / 8);
      const bool inside = token + own < place_.length && chunk * 8 < dim;
      copy_async(chunk_of(to, own, chunk), from + (inside ? (token + own - place_.tail_first) * dim + chunk * 8 : 0),
                 inside);
    }
  }
  __device__ __forceinline__ void to_halves(std::uint32_t (&x)[4]) const {
    if (!args_.bfloat16) return;
#pragma unroll
    for (std::uint32_t& pair : x)
      pair = pack(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000), __half());
  }

  __device__ void take_tail() {
    for (int turn = first_; turn < place_.all_turns; turn += step_) {
      const int token = place_.tail_first + (turn - place_.code_turns) * kTailTokens;
      const std::uint32_t keys = stages_.memory, values = keys + Memory::kTail / 2;
      start_tail(keys, kKeyMatrix, token);
      start_tail(values, kValueMatrix, token);
      commit_copies();
      wait_copies<0>();
      __syncwarp();
      float s[1][4] = {};
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        std::uint32_t a[4];
        load_matrices(a, chunk_of(keys, lane_ % 16, 2 * k + lane_ / 16));
        to_halves(a);
        multiply_add(s[0], a, query_.x[2 * k], query_.x[2 * k + 1], __half());
      }
      float factor[2];
      if (rows.weigh(s, token, factor)) rescale(factor);
      std::uint32_t p[2];
      to_operand(s, p);
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        std::uint32_t a[4];
        load_matrices_transposed(a, chunk_of(values, lane_ % 8 + lane_ / 16 * 8, 2 * d + lane_ / 8 % 2));
        to_halves(a);
        multiply_add(sums[d], a, p[0], p[1], __half());
      }
      __syncwarp();
    }
  }

  float middles_[kHeadDim / 64][4] = {};

 public:
  DecodeRows rows;
  float sums[kHeadDim / 16][4] = {};  // of channels 16 d + 8 i + g

  __device__ DecodeWarp(const DecodeArguments& args, const DecodePlace& place, std::uint32_t memory)
      : args_(args),
        place_(place),
        stages_(args, place, memory),
        query_(args, place),
        lane_(threadIdx.x % 32),
        blocks_(int(args.cache.layout.head_dim) / 32),
        first_(place.split * kDecodeWarps + int(threadIdx.x) / 32),
        step_(place.blocks * kDecodeWarps),
        rows(args, place, query_.unit) {}

  __device__ void run() {
    take_codes();
    take_tail();
#pragma unroll
    for (int c = 0; c < 2; ++c) rows.sum[c] = sum_of_column(rows.sum[c]);
  }
};

}  // namespace attnx::cuda
