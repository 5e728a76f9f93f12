// This is a consumer warpgroup of the forward: its 64 rows walk over the tiles of keys.
#pragma once

#include "cuda/common/tile.h"
#include "cuda/mainloop/sm90/forward_memory.h"
#include "cuda/mainloop/sm90/forward_places.h"
#include "cuda/mainloop/sm90/wgmma.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

// This stores a warp's 16 rows, which begin with warp_row of the tile, through its own part of shared memory.
template <class Storage, class Tile, class Args, class Place>
__device__ __forceinline__ void store_output(const Accumulators<16, Tile::kHeadDim>& output,
                                             const float (&logsumexp)[2], const Args& args,
                                             const ForwardMemory<Tile>& shared, const Place& place, int warp_row,
                                             int lane) {
  using Input = typename Storage::Input;
  using OutputTile = typename ForwardMemory<Tile>::QueryTile;
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
  Storage::template store_output<OutputTile>(shared.output(), args, place.sequence, place.batch, place.head, warp_row,
                                             row, place.row_end, lane);
  if (args.logsumexp.data && lane % 4 == 0) {
    const GroupedRows<float> rows{
        rows_of<float>(args.logsumexp, place.batch, query_head_of(args, place.head), place.sequence.first_q),
        args.logsumexp.row_stride, args.logsumexp.head_stride, args.group};
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (row + lane / 4 + row_of(r) < place.row_end) *rows.at(row + lane / 4 + row_of(r)) = logsumexp[r];
  }
}

// The warpgroup is numbered from 0.
template <class Score, class Tiles, class Storage, class Logits, class Tile, class Args>
__device__ __forceinline__ void consume(const Args& args, const ForwardMemory<Tile>& shared, int warpgroup) {
  using Input = typename Storage::Input;
  using Memory = ForwardMemory<Tile>;
  using QueryTile = typename Memory::QueryTile;
  using KeyTile = typename Memory::KeyTile;
  constexpr int kN = Tile::kN, kHeadDim = Tile::kHeadDim;
  using Scores = float[1][kN / 8][4];
  const int lane = threadIdx.x % 32;
  const int warp_row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16;  // the warp's first row of the tile

  const std::uint64_t query = QueryTile::by_rows(shared.query) + QueryTile::step(warpgroup * 64, 0);
  const std::uint64_t key = KeyTile::by_rows(shared.key(0)), value = KeyTile::transposed(shared.value(0));
  const auto release = [&](std::uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };

  Ring<Tile::kStages> keys, values;
  std::uint32_t query_phase = 0;
  typename Score::template Forward<Input, Tile, 2> score;

  while (true) {
    wait(shared.query_full(), query_phase);
    query_phase ^= 1;
    const int tile = int(load_shared_word(shared.row_tile()));
    if (tile < 0) break;
    Storage::receive();
    const auto place = nth_place<Tiles>(args, tile, Tile());
    const auto tiles = Tiles::template keys<Tile>(args, place);
    const int count = tiles.end() - tiles.begin();
    const auto& band = place.sequence.band;
    const int row = place.row_begin + warp_row + lane / 4;  // the thread's first

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = min(row + row_of(r), place.row_end - 1), at = args.group.divide(own);
      score.set_row(r, args.score, band, query_head_of(args, place.head) + own - at * args.group.divisor(), at,
                    place.split);
    }
    // For all rows of the warpgroup, the logits of these keys are a positive multiple of the products.
    const int first_row = min(place.row_begin + warpgroup * 64, place.row_end - 1);
    Visible plain =
        band.seen_by_all(args.group.divide(first_row), args.group.divide(min(first_row + 64, place.row_end) - 1));
    if (args.alibi_slopes.data || !(args.scale_log2 > 0)) plain.end = -1;

    // Where the next sequence follows in memory, its values must not meet weights of 0, because they may be no numbers.
    const auto clear_values = [&](int rows) {
      if (rows >= kN) return;
      wait(shared.value_full(values.stage), values.phase);
      for (int i = threadIdx.x - 128; i < (kN - rows) * KeyTile::kChunks; i += Tile::kWarpgroups * 128)
        store_shared(shared.value(values.stage) + KeyTile::offset(rows + i / KeyTile::kChunks, i % KeyTile::kChunks),
                     make_uint4(0, 0, 0, 0));
      fence_async_proxy();
      meet(1, Tile::kWarpgroups * 128);
    };
    if (Storage::kReadsOn && !Tiles::kFromMemory && args.key_ends && count > 0)
      clear_values(band.length_k - tiles.first(tiles.end() - 1));

    Accumulators<16, kHeadDim> output;
    clear(output);

    // This does tile i. Whether a tile must be masked is known beforehand, except for tiles from memory, whose keys are
    // known only once they are here.
    const auto first_key = [&](int i) { return tiles.first(tiles.end() - 1 - i); };
    const auto is_plain = [&](int key) { return key >= plain.first && key + kN <= plain.end; };
    const auto step = [&]<bool kPlain>(std::bool_constant<kPlain>, int i) {
      // S = Q K^T starts behind the products of the last tile's weights.
      wait(shared.key_full(keys.stage), keys.phase);
      Storage::receive();
      Scores s;
      begin_products();
#pragma unroll
      for (int k = 0; k < kHeadDim; k += 16)
        multiply_shared<false, false>(s[0], query + QueryTile::step(0, k),
                                      key + (keys.stage * KeyTile::kBytes >> 4) + KeyTile::step(0, k), k > 0, Input());
      commit_products();
      int first = 0;
      float bias = 0, divisor = 1;
      if constexpr (Tiles::kFromMemory) {
        const uint4 published = load_shared(shared.key_tile(keys.stage));
        first = int(published.x);
        bias = __uint_as_float(published.y) * kLog2E;
        divisor = __uint_as_float(published.z);
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

      typename Logits::template Forward<Score, Input, 1, kN / 8> logits;
      float multiplier = args.scale_log2;
      const bool ragged = !kPlain && !is_plain(first);
      if (Logits::kEveryTile || ragged) {
        const auto own = nth_place<Tiles>(args, fresh(tile), Tile());
        logits.place(s, args, own, query_head_of(args, own.head), own.row_begin + warp_row + lane / 4,
                     first + lane % 4 * 2, ragged);
        // Tiles from memory come in any order, but all warpgroups find the same one ragged.
        if (Tiles::kFromMemory && ragged && args.key_ends) clear_values(max(own.sequence.band.length_k - first, 0));
        multiplier = 1;
      }
      score.template begin<Tiles::kHasBias>(s, output, multiplier, bias, divisor);

      // O += P V starts 16 keys at a time.
      wait(shared.value_full(values.stage), values.phase);
      Storage::receive();
      const Weights<decltype(score), decltype(logits), 1, kN / 8> weights{s, score, logits};
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
      if constexpr (!Tiles::kFromMemory && !Logits::kEveryTile)
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
      const float factor = score.finish(r) * Logits::result_factor(args);
      logsumexp[r] = score.logsumexp(r);
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        output[0][d][r * 2] *= factor;
        output[0][d][r * 2 + 1] *= factor;
      }
    }

    // The place is found again here, because keeping it through the loop would cost registers.
    const auto again = nth_place<Tiles>(args, fresh(tile), Tile());
    const auto store = [&] {
      if constexpr (Tile::kOutputOverQuery) meet(2 + warpgroup, 128);  // no warp's product reads the query any more
      // Addresses that the compiler keeps through the loop are spilled where a score says so.
      const int own_lane = requires { Score::kFindsOutputAnew; } ? fresh(lane) : lane;
      store_output<Storage>(output, logsumexp, args, shared, again, warp_row, own_lane);
    };
    if constexpr (Tiles::kHasPlaces) {  // clusters are not split
      store();
    } else if (args.splits.divisor() > 1) {
      store_partial<Score::kNormalised, Tile::kM>(output, logsumexp, args, args.partial, again,
                                                  again.row_begin + warp_row + lane / 4, lane);
    } else {
      store();
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

}  // namespace attnx::cuda
