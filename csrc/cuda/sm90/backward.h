// The backward mainloop for sm_90a: dK and dV of a tile of keys, and its part of dQ, by wgmma on tiles that TMA brings
// (FlashAttention-3, Shah et al. 2024).
//
// A block owns a tile of keys and walks over the tiles of rows (query, head of the group) that see it. One thread of
// its first warpgroup, the producer, has copies made: K and V once, Q and dO in rings of two stages. Each other
// warpgroup owns 64 keys, and computes transposed: S^T and dP^T come out of the tensor cores as the next products want
// their operand A, so that P never leaves the registers. A step:
//
//   S^T = K Q^T starts, behind the last step's dK | wait for all | place logits, if the tile is not whole | 16 rows at
//   a time: weights are made and packed, dV += P^T dO starts | the last step's dQ = dS K, to global memory | dP^T = V
//   dO^T | 16 rows at a time: dS = derivative * (dP - delta) is packed, dK += dS^T Q starts, and dS goes to shared
//   memory
//
// dQ sums over the keys of all warpgroups, and is the only product whose operand passes through shared memory: half of
// it is another warpgroup's. It is taken up a step later, behind the weights, so that no warpgroup waits for the other.
// dQ is summed in global memory in float32, four sums of a thread at a time, in the order of the threads' registers; a
// last pass scales, rounds and puts them in place. Deterministic, the tiles of keys add in order.
//
// What a row adds to its logits comes from an earlier pass, which for the sigmoid reads no tensor. The sigmoid has no
// delta.
//
// Barriers, with who arrives: keys_full (producer, bytes of K and V), query_full and grad_output_full by stage
// (producer, bytes), query_empty and grad_output_empty by stage (a lane of each
// consumer warp), grad_logits_full by stage of dS (likewise). dS needs no barrier to be empty: who has seen the next
// one full knows that all have read this one.
#pragma once

#include "cuda/backward_rows.h"
#include "cuda/logits.h"
#include "cuda/sm90/backward_arguments.h"
#include "cuda/sm90/backward_ptx.h"
#include "cuda/sm90/backward_tile_sizes.h"
#include "cuda/sm90/swizzled_tile.h"
#include "cuda/sm90/wgmma.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

// The block's shared memory, by address.
template <class Tile>
struct BackwardMemory {
  using KeyTile = SwizzledTile<Tile::kN, Tile::kHeadDim>;
  using RowTile = SwizzledTile<Tile::kM, Tile::kHeadDim>;
  using LogitTile = SwizzledTile<Tile::kN, Tile::kM>;  // dS^T
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
  // float32 of each row: what its logits get, times log2(e); what the gradients of its weights lose.
  __device__ __forceinline__ std::uint32_t offset(int stage) const {
    return grad_logits(kLogitStages) + stage * Tile::kM * 4;
  }
  __device__ __forceinline__ std::uint32_t delta(int stage) const { return offset(kStages + stage); }
  // What the producer says of a tile of rows (PublishedTile).
  __device__ __forceinline__ std::uint32_t tile(int stage) const { return offset(2 * kStages) + stage * 32; }
  __device__ __forceinline__ std::uint32_t keys_full() const { return tile(kStages); }
  __device__ __forceinline__ std::uint32_t query_full(int stage) const { return keys_full() + 8 + stage * 8; }
  __device__ __forceinline__ std::uint32_t query_empty(int stage) const { return query_full(kStages + stage); }
  __device__ __forceinline__ std::uint32_t grad_output_full(int stage) const { return query_full(2 * kStages + stage); }
  __device__ __forceinline__ std::uint32_t grad_output_empty(int stage) const {
    return query_full(3 * kStages + stage);
  }
  __device__ __forceinline__ std::uint32_t grad_logits_full(int stage) const { return query_full(4 * kStages + stage); }
  static_assert(kStages * 32 + 8 + (4 * kStages + kLogitStages) * 8 <= Tile::kBarrierBytes);

  __device__ __forceinline__ void init_barriers() const {
    constexpr int kConsumerWarps = Tile::kWarpgroups * 4;
    init_barrier(keys_full(), 1);
    for (int s = 0; s < kStages; ++s) {
      init_barrier(query_full(s), 1);
      init_barrier(query_empty(s), kConsumerWarps);
      init_barrier(grad_output_full(s), 1);
      init_barrier(grad_output_empty(s), kConsumerWarps);
    }
    for (int s = 0; s < kLogitStages; ++s) init_barrier(grad_logits_full(s), kConsumerWarps);
  }
};

// Which tile of keys a block owns, and the tiles of rows that see it.
template <bool kListed, class Tile>
struct BackwardPlace {
  int key_begin, head, batch;
  Sequence sequence;
  int row_end;  // of the sequence
  int turns;    // heads of tiles of rows on the key head

  __device__ __forceinline__ BackwardPlace(const BackwardArguments& args, int block) {
    key_begin = args.key_blocks.split(block) * Tile::kN;
    head = args.key_heads.split(block);
    batch = block;
    sequence = args.sequence(batch);
    row_end = sequence.length_q * args.group.divisor();
    turns = args.heads.divisor() / args.key_heads.divisor();
  }

  __device__ __forceinline__ int row_head(int turn) const { return head * turns + turn; }
  __device__ __forceinline__ std::int64_t row_tile(const BackwardArguments& args, int turn, int row_begin) const {
    return row_head(turn) * args.row_tiles + args.row_tile(batch, sequence, row_begin / Tile::kM, Tile::kM);
  }

  // Calls step(turn, row, bias) for each tile of rows in order: its first row and, of a listed one, its bias.
  template <class Step>
  __device__ __forceinline__ void for_each(const BackwardArguments& args, const Step& step) const {
    if constexpr (kListed) {
#pragma unroll 1
      for (int turn = 0; turn < turns; ++turn) {
        const ListedTiles<Tile::kM> tiles(
            List(args.call.query_blocks, batch, row_head(turn), key_begin / int(args.call.block_k)),
            int(args.call.block_q));
#pragma unroll 1
        for (int tile = tiles.begin(); tile < tiles.end(); ++tile) step(turn, tiles.key(tile), tiles.bias(tile));
      }
    } else {
      const BandRowTiles<Tile::kM> tiles(sequence.band, key_begin, Tile::kN, sequence.length_q, args.group.divisor());
#pragma unroll 1
      for (int turn = 0; turn < turns; ++turn)
#pragma unroll 1
        for (int tile = tiles.begin(); tile < tiles.end(); ++tile) step(turn, tiles.row(tile), 0);
    }
  }

  // The same, computed anew: where it is needed in a loop, rather than kept in registers through it.
  static __device__ __forceinline__ BackwardPlace again(const BackwardArguments& args) {
    return {args, fresh(int(blockIdx.x))};
  }
};

// What the producer tells the consumers of a tile of rows, so that they need no place in their registers for where
// their own tile stands.
struct PublishedTile {
  int row;       // the first; -1 after the last tile
  int row_tile;  // where its sums lie
  int before;    // deterministic: how many tiles of keys add to its sums first
  int turn;
  unsigned masked;  // a bit for each warpgroup: whether its logits must be placed; and kRagged
  float bias;       // of a listed tile, times log2(e)

  static constexpr unsigned kRagged = 1u << 31;  // other sequences' rows are in the tile

  __device__ __forceinline__ void store(std::uint32_t to) const {
    store_shared(to, make_uint4(row, row_tile, before, turn));
    store_shared(to + 16, masked);
    store_shared(to + 20, __float_as_uint(bias));
  }
  static __device__ __forceinline__ PublishedTile load(std::uint32_t from) {
    const uint4 x = load_shared(from);
    return {int(x.x),
            int(x.y),
            int(x.z),
            int(x.w),
            load_shared_word(from + 16),
            __uint_as_float(load_shared_word(from + 20))};
  }
};

// Where a role stands in the rings.
template <int kStages>
struct Step {
  int number = 0;

  __device__ __forceinline__ int stage() const { return number % kStages; }
  __device__ __forceinline__ std::uint32_t parity() const { return number / kStages & 1; }
};

// The producer: one thread.
template <bool kHasDelta, bool kListed, class Tile>
__device__ __forceinline__ void produce_tiles(const TmaBackwardArguments& launch, const BackwardMemory<Tile>& shared) {
  using Memory = BackwardMemory<Tile>;
  using Place = BackwardPlace<kListed, Tile>;
  const BackwardArguments& args = launch.args;
  prefetch(launch.query);
  prefetch(launch.key);
  prefetch(launch.value);
  prefetch(launch.grad_output);

  const Place own = Place::again(args);
  const auto batch_of = [&](const Place& place) { return args.call.cu_seqlens_q ? 0 : place.batch; };
  arrive_expecting(shared.keys_full(), 2 * Memory::KeyTile::kBytes);
  int keys[5] = {0, 0, int(own.sequence.first_k) + own.key_begin, own.head, batch_of(own)};
  Memory::KeyTile::load(shared.key, launch.key, keys, shared.keys_full(), kEvictFirst);
  Memory::KeyTile::load(shared.value(), launch.value, keys, shared.keys_full(), kEvictFirst);

  Step<Tile::kStages> step;
  own.for_each(args, [&](int turn, int row, float bias) {
    constexpr int kTermBytes = Tile::kM * 4;
    const int stage = step.stage();
    const std::uint32_t before = step.parity() ^ 1;
    ++step.number;
    const Place place = Place::again(args);
    const Band& band = place.sequence.band;
    const int row_tile = int(place.row_tile(args, turn, row));

    wait(shared.query_empty(stage), before);
    PublishedTile tile{row, row_tile, 0, turn, 0, kListed ? bias * kLog2E : 0};
    if (args.deterministic)
      tile.before = tiles_before<kListed, Tile::kN>(args, band, place.batch, args.query_head(place.row_head(turn)), row,
                                                    place.key_begin);
    const Visible plain =
        band.seen_by_all(args.group.divide(row), args.group.divide(min(row + Tile::kM, place.row_end) - 1));
#pragma unroll
    for (int w = 0; w < Tile::kWarpgroups; ++w) {
      const int key = place.key_begin + w * 64;
      if (key < plain.first || key + 64 > plain.end || args.call.alibi_slopes.data) tile.masked |= 1u << w;
    }
    if (!kListed && args.call.cu_seqlens_q && row + Tile::kM > place.row_end) tile.masked |= PublishedTile::kRagged;
    tile.store(shared.tile(stage));

    int at[5] = {0, 0, int(place.sequence.first_q) + args.group.divide(row), place.row_head(turn), batch_of(place)};
    const std::int64_t first_term = std::int64_t(row_tile) * Tile::kM;
    arrive_expecting(shared.query_full(stage), Memory::RowTile::kBytes + kTermBytes);
    Memory::RowTile::load(shared.query(stage), launch.query, at, shared.query_full(stage), kEvictLast);
    load_bytes(shared.offset(stage), args.offset + first_term, kTermBytes, shared.query_full(stage));

    wait(shared.grad_output_empty(stage), before);
    arrive_expecting(shared.grad_output_full(stage), Memory::RowTile::kBytes + kHasDelta * kTermBytes);
    Memory::RowTile::load(shared.grad_output(stage), launch.grad_output, at, shared.grad_output_full(stage),
                          kEvictLast);
    if constexpr (kHasDelta)
      load_bytes(shared.delta(stage), args.delta + first_term, kTermBytes, shared.grad_output_full(stage));
  });
  wait(shared.query_empty(step.stage()), step.parity() ^ 1);
  PublishedTile{-1, 0, 0, 0, 0, 0}.store(shared.tile(step.stage()));
  arrive(shared.query_full(step.stage()));
}

// Over the eight lanes that share a column of accumulators.
__device__ __forceinline__ float sum_of_column(float x) {
#pragma unroll
  for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// A consumer warpgroup, numbered from 0.
template <Score kScore, class Input, bool kListed, class Tile>
__device__ __forceinline__ void consume_tiles(const BackwardArguments& args, const BackwardMemory<Tile>& shared,
                                              int warpgroup) {
  using Memory = BackwardMemory<Tile>;
  using KeyTile = typename Memory::KeyTile;
  using RowTile = typename Memory::RowTile;
  using LogitTile = typename Memory::LogitTile;
  using ScorePolicy = BackwardScore<kScore, Input>;
  constexpr int kM = Tile::kM, kN = Tile::kN, kHeadDim = Tile::kHeadDim, kParts = Tile::kGradQueryParts;
  constexpr int kChunks = kM / 16;  // of rows whose products start together
  const auto& call = args.call;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int own_key = warpgroup * 64;                      // the warpgroup's first of the tile
  const int key_in_tile = own_key + warp * 16 + lane / 4;  // the thread's first
  const int column = lane % 4 * 2;                         // the thread's first row of a tile
  using Place = BackwardPlace<kListed, Tile>;
  const auto release = [&](std::uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };
  // Rows from `begin` on of tiles that hold another sequence's rows there: they must not meet weights of 0, as they may
  // be no numbers.
  const auto clear_rows = [&](auto tile, std::uint32_t first, std::uint32_t second, int begin) {
    using Rows = decltype(tile);
#pragma unroll 1
    for (int i = threadIdx.x - 128; i < (Rows::kRows - begin) * Rows::kChunks; i += Tile::kConsumers) {
      const int at = Rows::offset(begin + i / Rows::kChunks, i % Rows::kChunks);
      store_shared(first + at, make_uint4(0, 0, 0, 0));
      store_shared(second + at, make_uint4(0, 0, 0, 0));
    }
    fence_async_proxy();
    meet(1, Tile::kConsumers);
  };

  const std::uint64_t own_keys = KeyTile::by_rows(shared.key) + KeyTile::step(own_key, 0);
  const std::uint64_t own_values = KeyTile::by_rows(shared.value()) + KeyTile::step(own_key, 0);

  wait(shared.keys_full(), 0);
  if (!kListed && call.cu_seqlens_k) {
    const Place place = Place::again(args);
    const int keys = place.sequence.band.length_k - place.key_begin;
    if (keys < kN) clear_rows(KeyTile(), shared.key, shared.value(), keys);
  }

  Accumulators<16, kHeadDim> grad_keys, grad_values;
  clear(grad_keys);
  clear(grad_values);

  // dQ of the last step, a part of 64 rows and 64 features at a time.
  using GradQuery = float[1][8][4];
  const auto part = [&](int number) { return number * Tile::kWarpgroups + warpgroup; };
  const auto start_grad_query = [&](GradQuery& sums, int number, int stage) {
    const int rows = part(number) % (kM / 64) * 64, features = part(number) / (kM / 64) * 64;
    const std::uint64_t grad_logits = LogitTile::transposed(shared.grad_logits(stage)) + LogitTile::step(0, rows);
    const std::uint64_t keys = KeyTile::transposed(shared.key) + KeyTile::step(0, features);
    begin_products();
#pragma unroll
    for (int k = 0; k < kN; k += 16)
      multiply_shared<true, true>(sums[0], grad_logits + LogitTile::step(k, 0), keys + KeyTile::step(k, 0), k > 0,
                                  Input());
  };
  const auto add_grad_query = [&](const GradQuery& sums, int number, std::int64_t row_tile) {
    float* const to = args.grad_query_sum + row_tile * (kM * kHeadDim) + (part(number) * 8 * 128 + thread) * 4;
#pragma unroll
    for (int n = 0; n < 8; ++n) add_to_global(to + n * 128 * 4, sums[0][n]);
  };
  // In deterministic order each warpgroup takes its own turn.
  const auto begin_turn = [&](int row_tile, int before) {
    if (!args.deterministic) return;
    if (thread == 0) wait_for_turn(args.turns + row_tile, before * Tile::kWarpgroups);
    meet(2 + warpgroup, 128);
  };
  const auto end_turn = [&](int row_tile) {
    if (!args.deterministic) return;
    __threadfence();
    meet(2 + warpgroup, 128);
    if (thread == 0) atomicAdd(args.turns + row_tile, 1);
  };

  Step<Tile::kStages> step;
  Step<Tile::kLogitStages> logit_step;
  int last_tile = -1, last_before = 0;  // of the last step, whose dQ is to come

  const auto add_last_grad_query = [&] {
    const int stage = (logit_step.number + Tile::kLogitStages - 1) % Tile::kLogitStages;
    wait(shared.grad_logits_full(stage), (logit_step.number - 1) / Tile::kLogitStages & 1);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      GradQuery sums;
      start_grad_query(sums, p, stage);
      commit_products();
      wait_products<0>();
      pin(sums);
      if (p == 0) begin_turn(last_tile, last_before);
      add_grad_query(sums, p, last_tile);
    }
    end_turn(last_tile);
  };

  while (true) {
    const int stage = step.stage();
    const std::uint32_t parity = step.parity();
    ++step.number;

    wait(shared.query_full(stage), parity);
    const PublishedTile tile = PublishedTile::load(shared.tile(stage));
    if (tile.row < 0) break;
    if (!kListed && tile.masked & PublishedTile::kRagged) {
      wait(shared.grad_output_full(stage), parity);
      clear_rows(RowTile(), shared.query(stage), shared.grad_output(stage), Place::again(args).row_end - tile.row);
    }

    // S^T = K Q^T, and the last step's dQ.
    float s[1][kM / 8][4];
    begin_products();
#pragma unroll
    for (int k = 0; k < kHeadDim; k += 16)
      multiply_shared<false, false>(s[0], own_keys + KeyTile::step(0, k),
                                    RowTile::by_rows(shared.query(stage)) + RowTile::step(0, k), k > 0, Input());
    commit_products();
    wait_products<0>();
    pin(s);
    pin(grad_keys);
    if (last_tile >= 0) release(shared.query_empty(stage ^ 1));

    float multiplier = args.scale_log2;
    if (tile.masked >> warpgroup & 1) {
      const Place place = Place::again(args);
      place_transposed_logits(s, args, place.sequence.band, args.query_head(place.row_head(tile.turn)),
                              place.key_begin + key_in_tile, tile.row + column);
      multiplier = 1;
    }

    // S becomes what dP - delta is multiplied with; dV += P^T dO.
    wait(shared.grad_output_full(stage), parity);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      std::uint32_t weights[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float (&pairs)[4] = s[0][c * 2 + i];
        float2 offset = load_shared_pair(shared.offset(stage) + (c * 16 + i * 8 + column) * 4);
        if constexpr (kListed) offset.x += tile.bias, offset.y += tile.bias;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const auto weight = [&](float& x, float offset) {
            return ScorePolicy::weight(fmaf(x, multiplier, offset), x);
          };
          const float low = weight(pairs[r * 2], offset.x), high = weight(pairs[r * 2 + 1], offset.y);
          weights[i * 2 + r] = pack(low, high, Input());
        }
      }
      begin_products();
      multiply_registers<true>(grad_values[0], weights,
                               RowTile::transposed(shared.grad_output(stage)) + RowTile::step(c * 16, 0), true,
                               Input());
      commit_products();
    }

    if constexpr (kParts > 1) {  // with the weights out of the way
      wait_products<0>();
      pin(grad_values);
    }
    if (last_tile >= 0) add_last_grad_query();
    wait_products<0>();
    pin(grad_values);

    // dP^T = V dO^T, once dQ and the weights have left their registers.
    float grad_logits[1][kM / 8][4];  // dP^T, then dS^T
    begin_products();
#pragma unroll
    for (int k = 0; k < kHeadDim; k += 16)
      multiply_shared<false, false>(grad_logits[0], own_values + KeyTile::step(0, k),
                                    RowTile::by_rows(shared.grad_output(stage)) + RowTile::step(0, k), k > 0, Input());
    commit_products();
    wait_products<0>();
    pin(grad_logits);

#pragma unroll
    for (int n = 0; n < kM / 8; ++n) {
      float2 delta{};
      if constexpr (ScorePolicy::kHasDelta) delta = load_shared_pair(shared.delta(stage) + (n * 8 + column) * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = grad_logits[0][n][e];
        x = s[0][n][e] * (ScorePolicy::kHasDelta ? x - (e % 2 ? delta.y : delta.x) : x);
      }
    }
    release(shared.grad_output_empty(stage));

    if (args.bias_sum || args.slope_sum) {
      // A row's sum over the warp's keys.
      const int warps = Tile::kWarpgroups * 4;
      const Place place = Place::again(args);
      const std::int64_t to = (std::int64_t(tile.row_tile) * warps + warpgroup * 4 + warp) * kM + column;
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

    // dK += dS^T Q, and dS for dQ.
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      std::uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&pairs)[4] = grad_logits[0][c * 2 + i / 2];
        packed[i] = pack(pairs[i % 2 * 2], pairs[i % 2 * 2 + 1], Input());
      }
      begin_products();
      multiply_registers<true>(grad_keys[0], packed,
                               RowTile::transposed(shared.query(stage)) + RowTile::step(c * 16, 0), true, Input());
      commit_products();
      store_matrices(shared.grad_logits(logit_step.stage()) +
                         LogitTile::offset(own_key + warp * 16 + lane % 16, c * 2 + lane / 16),
                     packed);
    }
    fence_async_proxy();
    __syncwarp();
    release(shared.grad_logits_full(logit_step.stage()));
    ++logit_step.number;
    last_tile = tile.row_tile;
    last_before = tile.before;
  }

  if (last_tile >= 0) add_last_grad_query();
  wait_products<0>();
  pin(grad_keys);

  const Place place = Place::again(args);
  // dK and dV, through the shared memory of K and V, once no product reads it any more.
  meet(1, Tile::kConsumers);
  const int row = own_key + warp * 16;
  store_accumulators<KeyTile, Input>(shared.key, row, 0, lane, grad_keys, args.scale);
  store_accumulators<KeyTile, Input>(shared.value(), row, 0, lane, grad_values, 1 / ScorePolicy::kWeightScale);
  __syncwarp();
  const auto store = [&](std::uint32_t tile, const Tensor& to, std::int64_t features) {
    Input* const rows = rows_of<Input>(to, place.batch, place.head, place.sequence.first_k);
    const int end = place.sequence.band.length_k - place.key_begin;
#pragma unroll
    for (int r = row + lane / 8; r < row + 16; r += 4)
#pragma unroll
      for (int c = lane % 8; c < KeyTile::kChunks; c += 8)
        if (r < end && c * 8 < features)
          store_global(rows + (place.key_begin + r) * to.row_stride + c * 8, load_shared(tile + KeyTile::offset(r, c)));
  };
  store(shared.key, call.grad_key, call.head_dim);
  store(shared.value(), call.grad_value, call.value_dim);
}

template <Score kScore, class Input, bool kListed, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    attnx_backward_sm90(const __grid_constant__ TmaBackwardArguments launch) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  const BackwardMemory<Tile> shared{shared_address(shared_bytes)};
  if (const auto place = BackwardPlace<kListed, Tile>::again(launch.args);
      place.key_begin >= place.sequence.band.length_k)
    return;
  if (threadIdx.x == 0) {
    shared.init_barriers();
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in all lanes, as the compiler can see
  if (warpgroup == 0) {
    release_registers_down_to<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) produce_tiles<BackwardScore<kScore, Input>::kHasDelta, kListed>(launch, shared);
  } else {
    claim_registers_up_to<Tile::kConsumerRegisters>();
    consume_tiles<kScore, Input, kListed>(launch.args, shared, warpgroup - 1);
  }
}

// dQ from its sums: the registers of attnx_backward_sm90's threads, a block a tile of rows.
template <class Input, class Tile>
__global__ void __launch_bounds__(128) attnx_grad_query_sm90(const __grid_constant__ BackwardArguments args) {
  constexpr int kM = Tile::kM, kHeadDim = Tile::kHeadDim;
  using RowTile = SharedTile<kM, kHeadDim>;
  extern __shared__ uint4 shared[];
  const std::uint32_t shared_rows = shared_address(shared);

  int block = blockIdx.x;
  const int query_block = args.query_blocks.split(block), batch = block % int(args.call.batch);
  const int head = block / int(args.call.batch);
  const Sequence sequence = args.sequence(batch);
  const int row_begin = query_block * kM, row_end = sequence.length_q * args.group.divisor();
  if (row_begin >= row_end) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t row_tile = head * args.row_tiles + args.row_tile(batch, sequence, query_block, kM);
  const float4* from = reinterpret_cast<const float4*>(args.grad_query_sum + row_tile * (kM * kHeadDim)) + threadIdx.x;
#pragma unroll
  for (int part = 0; part < kM / 64 * (kHeadDim / 64); ++part) {
    Accumulators<16, 64> grad_query;
#pragma unroll
    for (int n = 0; n < 8; ++n) *reinterpret_cast<float4*>(grad_query[0][n]) = from[(part * 8 + n) * 128];
    store_accumulators<RowTile, Input>(shared_rows, part % (kM / 64) * 64 + warp * 16, part / (kM / 64) * 64, lane,
                                       grad_query, args.scale);
  }
  __syncthreads();
  const Tensor& to = args.call.grad_query;
  const GroupedRows<Input> rows{rows_of<Input>(to, batch, args.query_head(head), sequence.first_q), to.row_stride,
                                to.head_stride, args.group};
  store_tile<true, RowTile, kM, 128>(shared_rows, 0, rows, row_begin, row_end, int(args.call.head_dim), threadIdx.x);
}

}  // namespace attnx::cuda
