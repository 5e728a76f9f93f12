// These are the keys of a turn: a warp multiplies a tile of tokens with the queries, and leaves the weights.
#pragma once

#include "cuda/staircase/decode/stages.h"
#include "cuda/staircase/decode/weights.h"

namespace attnx::cuda {

template <int kBits, int kHeadDim, int kTiles>
class DecodeKeys {
 public:
  using Memory = DecodeMemory<kBits, kHeadDim, kTiles>;

 protected:
  using Stages = DecodeStages<Memory, kBits, kHeadDim>;
  static constexpr int kPass = std::min(kTiles, 4);  // tiles of rows that meet unpacked keys

  const DecodeArguments& args_;
  const DecodePlace& place_;
  const std::uint32_t memory_;
  const Stages stages_;
  const int lane_, warp_, dim_;
  const DecodeWeights<Memory> weights_;

  __device__ DecodeKeys(const DecodeArguments& args, const DecodePlace& place, std::uint32_t memory)
      : args_(args),
        place_(place),
        memory_(memory),
        stages_(args, place, memory + Memory::kStagesAt),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        dim_(int(args.cache.layout.head_dim)),
        weights_{memory, place.end(args, 0), args.softmax} {}

  // These are a lane's words of a block of codes, and the ranges of its rows.
  __device__ __forceinline__ std::uint32_t word() const { return (lane_ % 4 * 8 + lane_ / 4) * 4; }
  __device__ __forceinline__ std::uint32_t range() const { return lane_ % 4 * 8; }
  static __device__ __forceinline__ std::uint32_t half_cell(int planes) {
    return power_pair(7 - (kBits << (planes - 1)));
  }

  __device__ __forceinline__ std::uint32_t weights(int parity, int tile, int rows) const {
    return memory_ + Memory::kWeightsAt + parity * Memory::kWeights + ((tile * kTiles + rows) * 32 + lane_) * 16;
  }
  __device__ __forceinline__ uint4 query(int block, int tile) const {
    return load_shared(memory_ + Memory::kQueryAt + ((block * kTiles + tile) * 32 + lane_) * 16);
  }
  static __device__ __forceinline__ void take(std::uint32_t (&to)[4], uint4 x) {
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  }
  __device__ __forceinline__ void to_halves(std::uint32_t (&x)[4]) const {
    if (!args_.bfloat16) return;
#pragma unroll
    for (std::uint32_t& pair : x)
      pair = pack(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000), __half());
  }

  template <DecodeKind kKind>
  __device__ __forceinline__ void multiply_keys(float (&s)[kPass][2][4], const DecodeTurn& turn, std::uint32_t stage,
                                                int first_tile) const {
    constexpr bool kRefined = kKind == DecodeKind::kRefined;
    float zero[kPass][4] = {};
    const int planes = kRefined ? stages_.planes(turn) : 1;
    const std::uint32_t key_ranges = stages_.template key_ranges<kKind>(stage, turn, warp_) + range();
    const std::uint32_t codes = stage + warp_ * dim_ * kBits * 4 + word();
#pragma unroll(kRefined ? 1 : kPass == 4 ? 2 : 4)
    for (int d = 0; d < dim_ / 32; ++d) {
      const RowRanges ranges(key_ranges + d * 128, half_cell(planes));
      std::uint32_t q[kPass][4];
#pragma unroll
      for (int n = 0; n < kPass; ++n) take(q[n], query(d, first_tile + n));
#pragma unroll
      for (int kk = 0; kk < 2; ++kk) {
        const std::uint32_t a[4] = {ranges.middle[2 * kk], ranges.middle[2 * kk], ranges.middle[2 * kk + 1],
                                    ranges.middle[2 * kk + 1]};
#pragma unroll
        for (int n = 0; n < kPass; ++n) multiply_add(zero[n], a, q[n][2 * kk], q[n][2 * kk + 1], __half());
      }
      multiply_block<kBits, kRefined>(s, codes, d, dim_, planes, false,
                                      [&](int n, int f) { return multiply_halves(q[n][f], ranges.step[f]); });
    }
#pragma unroll
    for (int n = 0; n < kPass; ++n)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][m][i] = fmaf(s[n][m][i], unit_of<kBits>(2 * m + i / 2), zero[n][i]);
  }

  __device__ __forceinline__ void multiply_tail(float (&s)[kPass][1][4], std::uint32_t stage, int first_tile) const {
#pragma unroll 1
    for (int d = 0; d < dim_ / 32; ++d) {
      std::uint32_t q[kPass][4];
#pragma unroll
      for (int n = 0; n < kPass; ++n) take(q[n], query(d, first_tile + n));
#pragma unroll
      for (int kk = 0; kk < 2; ++kk) {
        std::uint32_t a[4];
        load_matrices(a, tail_chunk<kHeadDim>(stage, lane_ % 16, 4 * d + 2 * kk + lane_ / 16));
        to_halves(a);
#pragma unroll
        for (int n = 0; n < kPass; ++n) multiply_add(s[n][0], a, q[n][2 * kk], q[n][2 * kk + 1], __half());
      }
    }
  }

  // Weights become the other operand of the products with values: tokens 8f + 2t and 8f + 2t + 1 of row g.
  template <int kTokens>
  __device__ __forceinline__ bool leave_weights(float (&s)[kPass][kTokens][4], const DecodeTurn& turn, int parity,
                                                int first_tile) const {
    bool risen = false;
#pragma unroll
    for (int n = 0; n < kPass; ++n) {
      risen |= weights_.weigh(s[n], first_tile + n, turn.first + warp_ * kDecodeTokens, parity);
      std::uint32_t p[4] = {};
#pragma unroll
      for (int f = 0; f < 2 * kTokens; ++f)
        p[f] = transpose(pack(s[n][f / 2][f % 2 * 2], s[n][f / 2][f % 2 * 2 + 1], __half()));
      store_shared(weights(parity, warp_, first_tile + n), make_uint4(p[0], p[1], p[2], p[3]));
    }
    return risen;
  }

  __device__ __forceinline__ void weigh(const DecodeTurn& turn, std::uint32_t stage, int parity) const {
    bool risen = false;
    if (warp_ < turn.tiles) {
#pragma unroll 1
      for (int tile = 0; tile < kTiles; tile += kPass) {
        if (turn.kind == DecodeKind::kTail) {
          float s[kPass][1][4] = {};
          multiply_tail(s, stage, tile);
          risen |= leave_weights(s, turn, parity, tile);
          continue;
        }
        float s[kPass][2][4] = {};
        if (kBits == 8 || turn.kind == DecodeKind::kPlain)
          multiply_keys<DecodeKind::kPlain>(s, turn, stage, tile);
        else
          multiply_keys<DecodeKind::kRefined>(s, turn, stage, tile);
        risen |= leave_weights(s, turn, parity, tile);
      }
    }
    weights_.tell(risen, parity);
  }
};

}  // namespace attnx::cuda
