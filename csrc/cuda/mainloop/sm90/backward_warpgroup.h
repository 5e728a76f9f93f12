// These are the pieces of a step that a consumer warpgroup of the backward does; backward_by_keys.h and
// backward_by_product.h put them in order.
//
// S and dP are computed transposed, 64 keys by the tile's rows: they come out of the tensor cores as the products with
// dO and Q want their operand A.
#pragma once

#include "cuda/common/reduce.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/backward_rows.h"
#include "cuda/mainloop/sm90/backward_producer.h"
#include "cuda/mainloop/sm90/wgmma.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

template <class Score_, class Tiles, class Storage, class Tile_>
struct BackwardWarpgroup {
  using Score = Score_;
  using Input = typename Storage::Input;
  using Arguments = BackwardArguments<Tiles, Storage, Plain>;
  using Tile = Tile_;
  using Memory = BackwardMemory<Tile>;
  using KeyTile = typename Memory::KeyTile;
  using RowTile = typename Memory::RowTile;
  using LogitTile = typename Memory::LogitTile;
  using Place = BackwardPlace<Tiles, Tile>;
  using ScorePolicy = typename Score::template Backward<Input>;
  static constexpr int kM = Tile::kM, kN = Tile::kN, kHeadDim = Tile::kHeadDim;
  static constexpr int kChunks = kM / 16;       // of rows whose products start together
  static constexpr int kKeyWarps = kN / 16;     // warps of the block that make dS
  using Logits = float[1][kM / 8][4];           // S^T and what becomes of it
  using GradKeys = Accumulators<16, kHeadDim>;  // dK or dV of the warp's 16 keys
  using GradQuery = float[1][Tile::kGradQueryColumns / 8][4];

  const Arguments& args;
  const Memory& shared;
  int number;               // the warpgroup's, from 0
  int lane, warp;           // in the warp, the warpgroup
  int own_key;              // the warpgroup's first key of the tile
  int key_in_tile, column;  // the thread's first key and row of the tile
  std::uint64_t own_keys, own_values;

  __device__ __forceinline__ BackwardWarpgroup(const Arguments& args, const Memory& shared, int number)
      : args(args),
        shared(shared),
        number(number),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32 % 4),
        own_key(Tile::kByProduct ? 0 : number * 64),
        key_in_tile(own_key + warp * 16 + lane / 4),
        column(lane % 4 * 2),
        own_keys(KeyTile::by_rows(shared.key) + KeyTile::step(own_key, 0)),
        own_values(KeyTile::by_rows(shared.value()) + KeyTile::step(own_key, 0)) {}

  // This is the thread's number in the warpgroup, which is not kept in a register.
  static __device__ __forceinline__ int thread() { return fresh(int(threadIdx.x)) % 128; }

  // What the warp has read or written comes before its arrival.
  __device__ __forceinline__ void release(std::uint32_t barrier) const {
    __syncwarp();
    if (lane == 0) arrive(barrier);
  }

  // This waits for tiles that the storage has brought.
  static __device__ __forceinline__ void wait_full(std::uint32_t barrier, std::uint32_t parity) {
    wait(barrier, parity);
    Storage::receive();
  }

  // This clears the rows from `begin` on of tiles that hold another sequence's rows there: these must not meet weights
  // of 0, because they may be no numbers.
  template <class Rows>
  static __device__ __forceinline__ void clear_rows(std::uint32_t first, std::uint32_t second, int begin) {
#pragma unroll 1
    for (int i = threadIdx.x - 128; i < (Rows::kRows - begin) * Rows::kChunks; i += Tile::kConsumers) {
      const int at = Rows::offset(begin + i / Rows::kChunks, i % Rows::kChunks);
      store_shared(first + at, make_uint4(0, 0, 0, 0));
      store_shared(second + at, make_uint4(0, 0, 0, 0));
    }
    fence_async_proxy();
    meet(1, Tile::kConsumers);
  }

  __device__ __forceinline__ void wait_for_keys() const {
    wait_full(shared.keys_full(), 0);
    if (Storage::kReadsOn && args.key_ends) {
      const Place place = Place::again(args);
      const int keys = place.sequence.band.length_k - place.key_begin;
      if (keys < kN) clear_rows<KeyTile>(shared.key, shared.value(), keys);
    }
  }

  // This waits for the next tile of rows, whose queries are there then.
  __device__ __forceinline__ PublishedTile wait_for_tile(int stage, std::uint32_t parity) const {
    wait_full(shared.query_full(stage), parity);
    const PublishedTile tile = PublishedTile::load(shared.tile(stage));
    if (Storage::kReadsOn && tile.row >= 0 && tile.masked & PublishedTile::kRagged) {
      wait(shared.grad_output_full(stage), parity);
      clear_rows<RowTile>(shared.query(stage), shared.grad_output(stage),
                          max(Place::again(args).row_end - tile.row, 0));
    }
    return tile;
  }
  __device__ __forceinline__ void wait_for_grad_output(int stage, std::uint32_t parity) const {
    wait_full(shared.grad_output_full(stage), parity);
  }

  // This starts x = K Q^T or V dO^T of the warpgroup's keys.
  __device__ __forceinline__ void start_logits(Logits& x, std::uint64_t keys, std::uint32_t rows) const {
    begin_products();
#pragma unroll
    for (int k = 0; k < kHeadDim; k += 16)
      multiply_shared<false, false>(x[0], keys + KeyTile::step(0, k), RowTile::by_rows(rows) + RowTile::step(0, k),
                                    k > 0, Input());
    commit_products();
  }

  // This masks S where the tile is not whole. It returns what the elements of S are multiplied with to be logits.
  __device__ __forceinline__ float place(Logits& s, const PublishedTile& tile) const {
    if (!(tile.masked >> (own_key / 64) & 1)) return args.scale_log2;
    const Place place = Place::again(args);
    place_transposed_logits(s, args, place.sequence.band, query_head_of(args, tile.row_head),
                            place.key_begin + key_in_tile, tile.row + column);
    return 1;
  }

  // This makes and packs the weights of 16 rows; S becomes what dP - delta is multiplied with.
  __device__ __forceinline__ void make_weights(std::uint32_t (&weights)[4], Logits& s, int chunk, float multiplier,
                                               const PublishedTile& tile, int stage) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float (&pairs)[4] = s[0][chunk * 2 + i];
      float2 offset = load_shared_pair(shared.offset(stage) + (chunk * 16 + i * 8 + column) * 4);
      if constexpr (Tiles::kHasBias) offset.x += tile.bias, offset.y += tile.bias;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto weight = [&](float& x, float offset) {
          if constexpr (ScorePolicy::kHasRows) {
            return ScorePolicy::weight(x * multiplier, offset, x);
          } else {
            return ScorePolicy::weight(fmaf(x, multiplier, offset), x);
          }
        };
        const float low = weight(pairs[r * 2], offset.x), high = weight(pairs[r * 2 + 1], offset.y);
        weights[i * 2 + r] = pack(low, high, Input());
      }
      if (kDivided<Score, Tiles> && tile.divisor != 1) {
#pragma unroll
        for (int e = 0; e < 4; ++e) pairs[e] *= 1 / tile.divisor;
      }
    }
  }

  // This brings the sums of dV, whose weights count divided, from the divisor of the last tile to that of this one. The
  // weights themselves stay as they are, because their dtype has little range.
  __device__ __forceinline__ void set_divisor(GradKeys& grad_values, float& divisor, const PublishedTile& tile) const {
    if (kDivided<Score, Tiles> && tile.divisor != divisor) {
      scale(grad_values, tile.divisor / divisor);
      divisor = tile.divisor;
    }
  }

  // This starts dK or dV += a B, for 16 rows of the tile B.
  __device__ __forceinline__ void start_grad_keys(GradKeys& sums, const std::uint32_t (&a)[4], std::uint32_t rows,
                                                  int chunk) const {
    begin_products();
    multiply_registers<true>(sums[0], a, RowTile::transposed(rows) + RowTile::step(chunk * 16, 0), true, Input());
    commit_products();
  }

  // These pass what rows of S have become to the warpgroup that has dP, which loads 8 rows at a time. Both keep the
  // order of their registers.
  __device__ __forceinline__ void store_derivatives(const Logits& s, int chunk) const {
#pragma unroll
    for (int n = chunk * 2; n < chunk * 2 + 2; ++n)
      store_shared(shared.derivative() + (n * 128 + warp * 32 + lane) * 16, s[0][n]);
  }
  __device__ __forceinline__ void load_derivatives(float (&x)[4], int n) const {
    load_shared(x, shared.derivative() + (n * 128 + warp * 32 + lane) * 16);
  }

  // This turns dP into dS; `derivatives(x, n)` gives what 8 rows of it are multiplied with.
  template <class Derivatives>
  __device__ __forceinline__ void make_grad_logits(Logits& x, int stage, const Derivatives& derivatives) const {
#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      float2 delta{};
      if constexpr (Score::kNormalised) delta = load_shared_pair(shared.delta(stage) + (n * 8 + column) * 4);
      float derivative[4];
      derivatives(derivative, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& y = x[0][n][e];
        y = derivative[e] * (Score::kNormalised ? y - (e % 2 ? delta.y : delta.x) : y);
      }
    }
  }

  // In deterministic order each warpgroup takes its own turn at the sums of a tile of rows, and ends it when it has
  // added those of dQ.
  __device__ __forceinline__ void begin_turn(int row_tile, int before) const {
    if (!args.deterministic) return;
    if (thread() == 0) wait_for_turn(args.turns + row_tile, before * Tile::kWarpgroups);
    meet(2 + number, 128);
  }

  // This adds a row's sums over the warp's keys, which the gradients of bias and slopes are made from.
  __device__ __forceinline__ void add_parameter_sums(const Logits& grad_logits, const PublishedTile& tile) const {
    if (Tiles::kHasPlaces || !args.bias_sum && !args.slope_sum) return;
    begin_turn(tile.row_tile, tile.before);
    const Place place = Place::again(args);
    const std::int64_t to = (std::int64_t(tile.row_tile) * kKeyWarps + own_key / 16 + warp) * kM + column;
#pragma unroll
    for (int n = 0; n < kM / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = n * 8 + e;
        const float distance = float(args.group.divide(tile.row + column + row) + place.sequence.band.offset -
                                     place.key_begin - key_in_tile);
        const float low = grad_logits[0][n][e], high = grad_logits[0][n][2 + e];
        const float sum = sum_of_column(low + high);
        const float weighted = sum_of_column(fmaf(low, fabsf(distance), high * fabsf(distance - 8)));
        if (lane / 4 == 0) {
          if (args.bias_sum) atomicAdd(args.bias_sum + to + row, sum);
          if (args.slope_sum) atomicAdd(args.slope_sum + to + row, -weighted);
        }
      }
  }

  // This starts dK += dS^T Q, and puts dS in shared memory for dQ.
  __device__ __forceinline__ void publish_grad_logits(const Logits& grad_logits, GradKeys& grad_keys, int stage,
                                                      int logit_stage) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      std::uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&pairs)[4] = grad_logits[0][c * 2 + i / 2];
        packed[i] = pack(pairs[i % 2 * 2], pairs[i % 2 * 2 + 1], Input());
      }
      start_grad_keys(grad_keys, packed, shared.query(stage), c);
      store_matrices(
          shared.grad_logits(logit_stage) + LogitTile::offset(own_key + warp * 16 + lane % 16, c * 2 + lane / 16),
          packed);
    }
    fence_async_proxy();
    release(shared.grad_logits_full(logit_stage));
  }

  // This adds the warpgroup's parts of dQ = dS K to the sums in global memory. Every product has ended when it returns,
  // but only the sums of dQ are pinned.
  __device__ __forceinline__ void add_grad_query(const Step<Tile::kLogitStages>& step, int row_tile, int before) const {
    wait(shared.grad_logits_full(step.stage()), step.parity());
#pragma unroll
    for (int p = 0; p < Tile::kGradQueryParts; ++p) {
      const int part = p * Tile::kWarpgroups + fresh(number);
      const std::uint64_t grad_logits =
          LogitTile::transposed(shared.grad_logits(step.stage())) + LogitTile::step(0, Tile::first_row(part));
      const std::uint64_t keys = KeyTile::transposed(shared.key) + KeyTile::step(0, Tile::first_feature(part));
      GradQuery sums;
      begin_products();
#pragma unroll
      for (int k = 0; k < kN; k += 16) {
        const std::uint64_t rows = grad_logits + LogitTile::step(k, 0), features = keys + KeyTile::step(k, 0);
        multiply_shared<true, true>(sums[0], Tile::kSwapGradQuery ? features : rows,
                                    Tile::kSwapGradQuery ? rows : features, k > 0, Input());
      }
      commit_products();
      wait_products<0>();
      pin(sums);
      if (p == 0) begin_turn(row_tile, before);
      constexpr int kVectors = Tile::kGradQueryColumns / 8;  // a thread's vectors of four sums
      float* const to =
          args.grad_query_sum + std::int64_t(row_tile) * (kM * kHeadDim) + (part * kVectors * 128 + thread()) * 4;
#pragma unroll
      for (int n = 0; n < kVectors; ++n) add_to_global(to + n * 128 * 4, sums[0][n]);
    }
    if (args.deterministic) {
      __threadfence();
      meet(2 + number, 128);
      if (thread() == 0) atomicAdd(args.turns + row_tile, 1);
    }
  }

  // This stores dK or dV of the warp's keys, rounded, by way of a tile of shared memory that no product reads any more.
  template <class Rows, class Addend>
  __device__ __forceinline__ void store_grad_keys(GradKeys& sums, float factor, std::uint32_t tile, const Rows& to,
                                                  std::int64_t features, const Addend& addend) const {
    const int row = own_key + warp * 16;
    if constexpr (Tiles::kHasAddend) {
      if (const Tensor& from = addend(args.tiles); from.data) {
        const Place place = Place::again(args);
        const StridedRows<const float> rows{rows_of<const float>(from, place.batch, place.head, place.sequence.first_k),
                                            from.row_stride};
        add_rows(sums, factor, rows, place.key_begin + row, place.sequence.band.length_k, 0, int(features), lane);
        factor = 1;
      }
    }
    store_accumulators<KeyTile, Input>(tile, row, 0, lane, sums, factor);
    __syncwarp();
    const Place place = Place::again(args);
    const auto rows = Storage::template key_rows<Input>(to, place.batch, place.head, place.sequence);
    const int end = place.sequence.band.length_k - place.key_begin;
#pragma unroll
    for (int r = row + lane / 8; r < row + 16; r += 4) {
      Input* const own = rows.at(place.key_begin + r);
#pragma unroll
      for (int c = lane % 8; c < KeyTile::kChunks; c += 8)
        if (r < end && c * 8 < features) store_global(own + c * 8, load_shared(tile + KeyTile::offset(r, c)));
    }
  }
};

}  // namespace attnx::cuda
