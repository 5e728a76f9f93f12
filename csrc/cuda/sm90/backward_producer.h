// The producer of the backward: one thread, which has TMA bring the tiles.
#pragma once

#include "cuda/backward_rows.h"
#include "cuda/sm90/backward_arguments.h"
#include "cuda/sm90/backward_memory.h"

namespace attnx::cuda {

// Which tile of keys a block owns, and the tiles of rows that see it.
template <bool kListed, class Tile>
struct BackwardPlace {
  int key_begin, head, batch;
  Sequence sequence;
  int row_end;    // of the sequence
  int row_heads;  // of tiles of rows on the key head

  __device__ __forceinline__ BackwardPlace(const BackwardArguments& args, int block) {
    key_begin = args.key_blocks.split(block) * Tile::kN;
    head = args.key_heads.split(block);
    batch = block;
    sequence = args.sequence(batch);
    row_end = sequence.length_q * args.group.divisor();
    row_heads = args.row_heads;
  }

  __device__ __forceinline__ int row_heads_end() const { return (head + 1) * row_heads; }
  __device__ __forceinline__ std::int64_t row_tile(const BackwardArguments& args, int row_head, int row_begin) const {
    return row_head * args.row_tiles + args.row_tile(batch, sequence, row_begin / Tile::kM, Tile::kM);
  }

  // Calls step(row_head, tiles, tile, row) for each tile of rows in order, `row` its first.
  template <class Step>
  __device__ __forceinline__ void for_each(const BackwardArguments& args, const Step& step) const {
    if constexpr (kListed) {
#pragma unroll 1
      for (int row_head = head * row_heads; row_head < again(args).row_heads_end(); ++row_head) {
        const ListedTiles<Tile::kM> tiles(
            List(args.call.query_blocks, again(args).batch, row_head, again(args).key_begin / int(args.call.block_k)),
            int(args.call.block_q));
#pragma unroll 1
        for (int tile = tiles.begin(); tile < tiles.end(); ++tile) step(row_head, tiles, tile, tiles.key(tile));
      }
    } else {
      const BandRowTiles<Tile::kM> tiles(sequence.band, key_begin, Tile::kN, sequence.length_q, args.group.divisor());
#pragma unroll 1
      for (int row_head = head * row_heads; row_head < again(args).row_heads_end(); ++row_head)
#pragma unroll 1
        for (int tile = tiles.begin(); tile < tiles.end(); ++tile) step(row_head, tiles, tile, tiles.row(tile));
    }
  }

  // The same, computed anew: where it is needed in a loop, rather than kept in registers through it.
  static __device__ __forceinline__ BackwardPlace again(const BackwardArguments& args) {
    return {args, fresh(int(blockIdx.x))};
  }
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
  own.for_each(args, [&](int row_head, const auto& tiles, int at_tile, int row) {
    constexpr int kTermBytes = Tile::kM * 4;
    const int stage = step.stage();
    const std::uint32_t before = step.parity() ^ 1;
    ++step.number;
    wait(shared.query_empty(stage), before);

    const Place place = Place::again(args);
    const Band& band = place.sequence.band;
    const int row_tile = int(place.row_tile(args, row_head, row));
    PublishedTile tile{row, row_tile, 0, row_head, 0, tiles.bias(at_tile) * kLog2E};
    if (args.deterministic)
      tile.before = tiles_before<kListed, Tile::kN>(args, band, row, place.key_begin, tiles.entry(at_tile));
    const Visible plain =
        band.seen_by_all(args.group.divide(row), args.group.divide(min(row + Tile::kM, place.row_end) - 1));
#pragma unroll
    for (int w = 0; w < Tile::kN / 64; ++w) {
      const int key = place.key_begin + w * 64;
      if (key < plain.first || key + 64 > plain.end || args.call.alibi_slopes.data) tile.masked |= 1u << w;
    }
    if (!kListed && args.call.cu_seqlens_q && row + Tile::kM > place.row_end) tile.masked |= PublishedTile::kRagged;
    tile.store(shared.tile(stage));

    int at[5] = {0, 0, int(place.sequence.first_q) + args.group.divide(row), row_head, batch_of(place)};
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

}  // namespace attnx::cuda
