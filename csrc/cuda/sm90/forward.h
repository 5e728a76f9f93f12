// The forward mainloop for sm_90a: wgmma on tiles that TMA brings, by warps of two roles (FlashAttention-3, Shah et al.
// 2024).
//
// A block stays and takes tiles of rows (query, head of the group) from a counter, the longest first. One thread of its
// first warpgroup, the producer, has copies made: Q, and K and V in rings of two stages, V one step behind K. Each
// other warpgroup owns 64 rows and walks over the tiles of keys. A step:
//
//   S = Q K^T starts, behind the last step's products | wait for all | place logits, if the tile is not whole | score;
//   and 16 keys at a time: weights are made and packed, O += P V starts
//
// so that the tensor cores multiply the weights of 16 keys while those of the next 16 are made, and the warpgroups'
// products run under each other's scores. A sigmoid needs nothing of S but the element; softmax looks at the row's
// maximum first.
//
// Barriers, with who arrives: query_full (producer, bytes of Q), query_empty (a lane of each consumer warp), key_full
// and value_full by stage (producer, bytes), key_empty and value_empty by stage (a lane of each consumer warp). The
// number of the tile of rows stands in shared memory under query_full and query_empty, as a listed tile's first key and
// bias do under key_full and key_empty.
#pragma once

#include "cuda/forward_rows.h"
#include "cuda/score/sigmoid.h"
#include "cuda/score/softmax.h"
#include "cuda/sm90/forward_arguments.h"
#include "cuda/sm90/swizzled_tile.h"
#include "cuda/sm90/tile_sizes.h"
#include "cuda/sm90/wgmma.h"
#include "cuda/tiles/band.h"
#include "cuda/tiles/listed.h"

namespace attnx::cuda {

// A ring of stages: where it stands, and the parity of the phase there.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// The block's shared memory, by address.
template <class Tile>
struct ForwardMemory {
  using QueryTile = SwizzledTile<Tile::kM, Tile::kHeadDim>;
  using KeyTile = SwizzledTile<Tile::kN, Tile::kHeadDim>;
  static constexpr int kStages = Tile::kStages;

  std::uint32_t query;

  __device__ __forceinline__ std::uint32_t key(int stage) const {
    return query + QueryTile::kBytes + stage * KeyTile::kBytes;
  }
  __device__ __forceinline__ std::uint32_t value(int stage) const { return key(kStages + stage); }
  __device__ __forceinline__ std::uint32_t output() const { return Tile::kOutputOverQuery ? query : key(2 * kStages); }
  __device__ __forceinline__ std::uint32_t query_full() const {
    return key(2 * kStages) + (Tile::kOutputOverQuery ? 0 : QueryTile::kBytes);
  }
  __device__ __forceinline__ std::uint32_t query_empty() const { return query_full() + 8; }
  __device__ __forceinline__ std::uint32_t key_full(int stage) const { return query_full() + 16 + stage * 8; }
  __device__ __forceinline__ std::uint32_t key_empty(int stage) const { return key_full(kStages + stage); }
  __device__ __forceinline__ std::uint32_t value_full(int stage) const { return key_full(2 * kStages + stage); }
  __device__ __forceinline__ std::uint32_t value_empty(int stage) const { return key_full(3 * kStages + stage); }
  // The number of the tile of rows; of a listed tile of keys the first key and the bias.
  __device__ __forceinline__ std::uint32_t row_tile() const { return key_full(4 * kStages); }
  __device__ __forceinline__ std::uint32_t first_key(int stage) const { return row_tile() + 8 + stage * 8; }
  static_assert(16 + 4 * kStages * 8 + 8 + kStages * 8 <= Tile::kBarrierBytes);

  __device__ __forceinline__ void init_barriers() const {
    constexpr int kConsumers = Tile::kWarpgroups * 4;
    init_barrier(query_full(), 1);
    init_barrier(query_empty(), kConsumers);
    for (int s = 0; s < kStages; ++s) {
      init_barrier(key_full(s), 1);
      init_barrier(key_empty(s), kConsumers);
      init_barrier(value_full(s), 1);
      init_barrier(value_empty(s), kConsumers);
    }
  }
};

// The tiles of keys of a tile of rows.
template <bool kListed, class Tile>
__device__ __forceinline__ auto key_tiles(const ForwardArguments& args, const ForwardPlace& place) {
  if constexpr (kListed) {
    return ListedTiles<Tile::kN>(
        List(args.call.key_blocks, place.batch, place.head, place.row_begin / int(args.call.block_q)),
        int(args.call.block_k));
  } else {
    const int last_row = min(place.row_begin + Tile::kM, place.row_end) - 1;
    return BandTiles<Tile::kN>(place.sequence.band, args.group.divide(place.row_begin), args.group.divide(last_row),
                               place.split, args.splits.divisor());
  }
}

// The producer: one thread.
template <bool kListed, class Tile>
__device__ __forceinline__ void produce(const TmaForwardArguments& launch, const ForwardMemory<Tile>& shared) {
  using Memory = ForwardMemory<Tile>;
  const ForwardArguments& args = launch.args;
  prefetch(launch.query);
  prefetch(launch.key);
  prefetch(launch.value);
  Ring<Tile::kStages> keys, values;
  std::uint32_t query_phase = 0;
  int tile = blockIdx.x;

  const auto publish = [&](int row_tile, int bytes) {
    wait(shared.query_empty(), query_phase ^ 1);
    query_phase ^= 1;
    store_shared(shared.row_tile(), std::uint32_t(row_tile));
    arrive_expecting(shared.query_full(), bytes);
  };

  while (tile < launch.row_tiles) {
    const int next = gridDim.x + atomicAdd(launch.taken, 1);  // well before it is needed
    const ForwardPlace place = ForwardPlace::of(args, launch.in_order(tile), Tile());
    if (place.row_begin < place.row_end) {
      const auto tiles = key_tiles<kListed, Tile>(args, place);
      const int count = tiles.end() - tiles.begin();
      const int batch = args.call.cu_seqlens_q ? 0 : place.batch, head = args.key_head(place.head);
      const auto first_key = [&](int i) { return tiles.key(tiles.end() - 1 - i); };
      int ahead = count > 0 ? first_key(0) : 0;  // of a list, read one step before it is needed
      int behind = 0;

      const auto load_key = [&](int i) {
        const int key = ahead;
        if (i + 1 < count) ahead = first_key(i + 1);
        wait(shared.key_empty(keys.stage), keys.phase ^ 1);
        if constexpr (kListed) {
          store_shared(shared.first_key(keys.stage), std::uint32_t(key));
          store_shared(shared.first_key(keys.stage) + 4, __float_as_uint(tiles.bias(tiles.end() - 1 - i)));
        }
        arrive_expecting(shared.key_full(keys.stage), Memory::KeyTile::kBytes);
        int at[5] = {0, 0, int(place.sequence.first_k) + key, head, batch};
        Memory::KeyTile::load(shared.key(keys.stage), launch.key, at, shared.key_full(keys.stage), kEvictLast);
        keys.advance();
        return key;
      };
      const auto load_value = [&](int key) {
        wait(shared.value_empty(values.stage), values.phase ^ 1);
        arrive_expecting(shared.value_full(values.stage), Memory::KeyTile::kBytes);
        int at[5] = {0, 0, int(place.sequence.first_k) + key, head, batch};
        Memory::KeyTile::load(shared.value(values.stage), launch.value, at, shared.value_full(values.stage),
                              kEvictLast);
        values.advance();
      };

      if (count > 0) behind = load_key(0);
      publish(tile, Memory::QueryTile::kBytes);
      // Rows are (query, head of the group); where heads do not share a tile the one head stands among all.
      const int first_query = int(place.sequence.first_q) + args.group.divide(place.row_begin);
      int at[5] = {0, 0, first_query, place.head, batch};
      Memory::QueryTile::load(shared.query, launch.query, at, shared.query_full(), kEvictFirst);
#pragma unroll 1
      for (int i = 1; i < count; ++i) {
        const int key = load_key(i);
        load_value(behind);
        behind = key;
      }
      if (count > 0) load_value(behind);
    }
    tile = next;
  }
  publish(-1, 0);
}

// Of the formulas of the sigmoid the one with fewer special functions: with 64 features they take as long as the tensor
// cores, and nothing is gained by more of them with others.
template <Score kScore, class Input>
using TmaForwardScore =
    std::conditional_t<kScore == Score::kSoftmax, SoftmaxForward<Input, 2>, SigmoidForward<Input, NewtonSigmoid, 2>>;

// A warp's 16 rows, from this one of the tile on, through its own part of shared memory.
template <class Input, class Tile>
__device__ __forceinline__ void store_output(const Accumulators<16, Tile::kHeadDim>& output,
                                             const float (&logsumexp)[2], const TmaForwardArguments& launch,
                                             const ForwardMemory<Tile>& shared, const ForwardPlace& place, int warp_row,
                                             int lane) {
  using OutputTile = typename ForwardMemory<Tile>::QueryTile;
  const ForwardArguments& args = launch.args;
  const auto& call = args.call;
  const int row = place.row_begin + warp_row;
  if (lane == 0) wait_stores_read();  // the last rows have left
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int d = 0; d < Tile::kHeadDim / 8; ++d)
      store_shared(shared.output() + OutputTile::offset(warp_row + lane / 4 + row_of(r), d) + lane % 4 * 4,
                   pack(output[0][d][r * 2], output[0][d][r * 2 + 1], Input()));
  }
  if (launch.stores_boxes) {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int p = 0; p < OutputTile::kPanels; ++p)
        store_box(launch.output, {p * OutputTile::kPanelFeatures, 0, args.group.divide(row), place.head, place.batch},
                  shared.output() + p * OutputTile::kPanelBytes + warp_row * 128);
      commit_stores();
    }
  } else {
    __syncwarp();
    store_tile<true, OutputTile, 16, 32>(shared.output(), warp_row, place.rows<Input>(args, call.output), row,
                                         place.row_end, int(call.value_dim), lane);
  }
  if (call.logsumexp.data && lane % 4 == 0) {
    const auto rows = place.rows<float>(args, call.logsumexp);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (row + lane / 4 + row_of(r) < place.row_end) *rows.at(row + lane / 4 + row_of(r)) = logsumexp[r];
  }
}

// A consumer warpgroup, numbered from 0.
template <Score kScore, class Input, bool kListed, class Tile>
__device__ __forceinline__ void consume(const TmaForwardArguments& launch, const ForwardMemory<Tile>& shared,
                                        int warpgroup) {
  using Memory = ForwardMemory<Tile>;
  using QueryTile = typename Memory::QueryTile;
  using KeyTile = typename Memory::KeyTile;
  constexpr int kN = Tile::kN, kHeadDim = Tile::kHeadDim;
  using Scores = float[1][kN / 8][4];
  const ForwardArguments& args = launch.args;
  const auto& call = args.call;
  const int lane = threadIdx.x % 32;
  const int warp_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;  // the warp's first row of the tile

  const std::uint64_t query = QueryTile::by_rows(shared.query) + QueryTile::step(warpgroup * 64, 0);
  const std::uint64_t key = KeyTile::by_rows(shared.key(0)), value = KeyTile::transposed(shared.value(0));
  const auto release = [&](std::uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };

  Ring<Tile::kStages> keys, values;
  std::uint32_t query_phase = 0;
  TmaForwardScore<kScore, Input> score;

  while (true) {
    wait(shared.query_full(), query_phase);
    query_phase ^= 1;
    const int tile = int(load_shared_word(shared.row_tile()));
    if (tile < 0) break;
    const ForwardPlace place = ForwardPlace::of(args, launch.in_order(tile), Tile());
    const auto tiles = key_tiles<kListed, Tile>(args, place);
    const int count = tiles.end() - tiles.begin();
    const Band& band = place.sequence.band;
    const int row = place.row_begin + warp_row + lane / 4;  // the thread's first

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = min(row + row_of(r), place.row_end - 1), at = args.group.divide(own);
      score.set_row(r, args, band, args.query_head(place.head) + own - at * args.group.divisor(), at);
    }
    // The keys whose logits are a positive multiple of the products, for all rows of the warpgroup.
    const int first_row = min(place.row_begin + warpgroup * 64, place.row_end - 1);
    Visible plain =
        band.seen_by_all(args.group.divide(first_row), args.group.divide(min(first_row + 64, place.row_end) - 1));
    if (call.alibi_slopes.data || !(args.scale_log2 > 0)) plain.end = -1;

    // Where the next sequence follows in memory, its values must not meet weights of 0: they may be no numbers.
    if (!kListed && call.cu_seqlens_k && count > 0) {
      const int rows = band.length_k - tiles.key(tiles.end() - 1);
      if (rows < kN) {
        wait(shared.value_full(values.stage), values.phase);
        for (int i = threadIdx.x - 128; i < (kN - rows) * KeyTile::kChunks; i += Tile::kWarpgroups * 128)
          store_shared(shared.value(values.stage) + KeyTile::offset(rows + i / KeyTile::kChunks, i % KeyTile::kChunks),
                       make_uint4(0, 0, 0, 0));
        fence_async_proxy();
        meet(1, Tile::kWarpgroups * 128);
      }
    }

    Accumulators<16, kHeadDim> output;
    clear(output);

    // Tile i. Whether it must be masked is known of a band's tiles beforehand, of listed ones only once they are here.
    const auto first_key = [&](int i) { return tiles.key(tiles.end() - 1 - i); };
    const auto is_plain = [&](int key) { return key >= plain.first && key + kN <= plain.end; };
    const auto step = [&]<bool kPlain>(std::bool_constant<kPlain>, int i) {
      // S = Q K^T, behind the products of the last tile's weights.
      wait(shared.key_full(keys.stage), keys.phase);
      Scores s;
      begin_products();
#pragma unroll
      for (int k = 0; k < kHeadDim; k += 16)
        multiply_shared<false, false>(s[0], query + QueryTile::step(0, k),
                                      key + (keys.stage * KeyTile::kBytes >> 4) + KeyTile::step(0, k), k > 0, Input());
      commit_products();
      int first = 0;
      float bias = 0;
      if constexpr (kListed) {
        first = int(load_shared_word(shared.first_key(keys.stage)));
        bias = __uint_as_float(load_shared_word(shared.first_key(keys.stage) + 4)) * kLog2E;
      } else if constexpr (!kPlain) {
        first = first_key(i);
      }
      wait_products<0>();
      pin(s);
      pin(output);
      release(shared.key_empty(keys.stage));
      keys.advance();
      if (i > 0) {
        release(shared.value_empty(values.stage));
        values.advance();
      }

      float multiplier = args.scale_log2;
      if (!kPlain && !is_plain(first)) {
        const ForwardPlace own = ForwardPlace::of(args, launch.in_order(fresh(tile)), Tile());
        place_logits(s, args, own.sequence.band, args.query_head(own.head), own.row_begin + warp_row + lane / 4,
                     first + lane % 4 * 2);
        multiplier = 1;
      }
      score.template begin<kListed>(s, output, multiplier, bias);

      // O += P V.
      wait(shared.value_full(values.stage), values.phase);
      const Weights<decltype(score), 1, kN / 8> weights{s, score};
#pragma unroll
      for (int k = 0; k < kN; k += 16) {
        std::uint32_t p[4];
        weights.load(p, 0, k);
        begin_products();
        multiply_registers<true>(output[0], p, value + (values.stage * KeyTile::kBytes >> 4) + KeyTile::step(k, 0),
                                 true, Input());
        commit_products();
      }
    };
    for (int i = 0; i < count; ++i) {
      if constexpr (!kListed)
#pragma unroll 1
        for (; i < count && is_plain(first_key(i)); ++i) step(std::true_type(), i);
      if (i < count) step(std::false_type(), i);
    }
    if (!Tile::kOutputOverQuery) release(shared.query_empty());
    wait_products<0>();
    pin(output);
    if (count > 0) {
      release(shared.value_empty(values.stage));
      values.advance();
    }

    float logsumexp[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = score.finish(r);
      logsumexp[r] = score.logsumexp(r);
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        output[0][d][r * 2] *= factor;
        output[0][d][r * 2 + 1] *= factor;
      }
    }

    // The place is found again, rather than kept in registers through the loop.
    const ForwardPlace again = ForwardPlace::of(args, launch.in_order(fresh(tile)), Tile());
    if (args.splits.divisor() > 1) {
      store_partial<kScore, Tile::kM>(output, logsumexp, args, again, again.row_begin + warp_row + lane / 4, lane);
    } else {
      if constexpr (Tile::kOutputOverQuery) meet(2 + warpgroup, 128);  // no warp's product reads the query any more
      store_output<Input>(output, logsumexp, launch, shared, again, warp_row, lane);
    }
    if constexpr (Tile::kOutputOverQuery) {
      if (lane == 0) wait_stores_read();
      fence_async_proxy();
      __syncwarp();
      release(shared.query_empty());
    }
  }
  if (lane == 0) wait_stores();
}

template <Score kScore, class Input, bool kListed, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    attnx_forward_sm90(const __grid_constant__ TmaForwardArguments launch) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  const ForwardMemory<Tile> shared{shared_address(shared_bytes)};
  if (threadIdx.x == 0) {
    shared.init_barriers();
    fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in all lanes, as the compiler can see
  if (warpgroup == 0) {
    release_registers_down_to<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) produce<kListed>(launch, shared);
  } else {
    claim_registers_up_to<Tile::kConsumerRegisters>();
    consume<kScore, Input, kListed>(launch, shared, warpgroup - 1);
  }
}

}  // namespace attnx::cuda
