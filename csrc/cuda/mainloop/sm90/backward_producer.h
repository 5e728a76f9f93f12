// This defines which tiles a block of the backward walks over, and its producer: the threads that have them brought.
#pragma once

#include "cuda/mainloop/backward_rows.h"
#include "cuda/mainloop/sm90/backward_memory.h"

namespace attnx::cuda {

// This says which tile of keys a block owns, and which tiles of rows see it.
template <class Tiles, class Tile>
struct BackwardPlace : KeyPlaceOf<Tiles>::Type {
  using KeyPlace = typename KeyPlaceOf<Tiles>::Type;
  int row_end;    // of the sequence
  int row_heads;  // of tiles of rows on the key head

  template <class Args>
  __device__ __forceinline__ BackwardPlace(const Args& args, int block)
      : KeyPlace(KeyPlace::of(args, block, Tile())),
        row_end(this->sequence.length_q * args.group.divisor()),
        row_heads(args.row_heads) {}

  __device__ __forceinline__ int row_heads_end() const { return (this->head + 1) * row_heads; }
  __device__ __forceinline__ std::int64_t row_tile(const BackwardGeometry& args, int row_head, int row_begin) const {
    if constexpr (Tiles::kHasPlaces) {
      return this->sequence.first_row_tile + row_begin / Tile::kM;
    } else {
      return row_head * args.row_tiles + row_tile_of(args, this->batch, this->sequence, row_begin / Tile::kM, Tile::kM);
    }
  }

  // This calls step(row_head, tiles, tile, row) for each tile of rows in order; `row` is the tile's first.
  template <class Args, class Step>
  __device__ __forceinline__ void for_each(const Args& args, const Step& step) const {
    if constexpr (Tiles::kHasPlaces) {
      const auto tiles = Tiles::template rows<Tile>(args, this->sequence, this->batch, this->head, this->key_begin);
#pragma unroll 1
      for (int tile = tiles.begin(); tile < tiles.end(); ++tile) step(again(args).head, tiles, tile, tiles.first(tile));
    } else if constexpr (Tiles::kPerHead) {
#pragma unroll 1
      for (int row_head = this->head * row_heads; row_head < again(args).row_heads_end(); ++row_head) {
        const BackwardPlace place = again(args);
        const auto tiles = Tiles::template rows<Tile>(args, place.sequence, place.batch, row_head, place.key_begin);
#pragma unroll 1
        for (int tile = tiles.begin(); tile < tiles.end(); ++tile) step(row_head, tiles, tile, tiles.first(tile));
      }
    } else {
      const auto tiles = Tiles::template rows<Tile>(args, this->sequence, this->batch, this->head, this->key_begin);
#pragma unroll 1
      for (int row_head = this->head * row_heads; row_head < again(args).row_heads_end(); ++row_head)
#pragma unroll 1
        for (int tile = tiles.begin(); tile < tiles.end(); ++tile) step(row_head, tiles, tile, tiles.first(tile));
    }
  }

  // This computes the place anew, for loops that should not keep it in registers.
  template <class Args>
  static __device__ __forceinline__ BackwardPlace again(const Args& args) {
    return {args, fresh(int(blockIdx.x))};
  }
};

template <bool kHasDelta, class Tiles, class Storage, class Tile, class Args>
__device__ __forceinline__ void produce_tiles(const Args& args, const BackwardMemory<Tile>& shared) {
  using KeyTile = typename BackwardMemory<Tile>::KeyTile;
  using RowTile = typename BackwardMemory<Tile>::RowTile;
  using Place = BackwardPlace<Tiles, Tile>;
  constexpr int kTermBytes = Tile::kM * 4;  // a number for each row
  const auto& tensors = args.tensors;
  Storage::prepare(tensors);

  const Place own = Place::again(args);
  Storage::announce(shared.keys_full(), 2 * KeyTile::kBytes);
  const auto keys =
      Storage::template find_keys<KeyTile>(tensors.key, args, own.sequence, own.batch, own.head, own.key_begin);
  Storage::template load_keys<KeyTile>(shared.key, tensors.key, args, own.sequence, own.batch, own.head, keys,
                                       shared.keys_full(), kEvictFirst);
  Storage::template load_keys<KeyTile>(shared.value(), tensors.value, args, own.sequence, own.batch, own.head, keys,
                                       shared.keys_full(), kEvictFirst);
  Storage::finish(shared.keys_full());
  const bool is_first = Storage::kProducers == 1 || threadIdx.x == 0;
  const auto load_terms = [&](std::uint32_t to, const float* from, std::uint32_t barrier) {
    if (is_first) load_bytes(to, from, kTermBytes, barrier);
  };

  Step<Tile::kStages> step;
  own.for_each(args, [&](int row_head, const auto& tiles, int at_tile, int row) {
    const int stage = step.stage();
    const std::uint32_t before = step.parity() ^ 1;
    ++step.number;
    wait(shared.query_empty(stage), before);

    const Place place = Place::again(args);
    const auto& band = place.sequence.band;
    const int row_tile = int(place.row_tile(args, row_head, row));
    PublishedTile tile{row, row_tile, 0, row_head, 0, tiles.bias(at_tile) * kLog2E, tiles.divisor(at_tile)};
    if (args.deterministic)
      tile.before = Tiles::template before<Tile::kN>(args, band, row, place.key_begin, tiles, at_tile);
    const Visible plain =
        band.seen_by_all(args.group.divide(row), args.group.divide(min(row + Tile::kM, place.row_end) - 1));
#pragma unroll
    for (int w = 0; w < Tile::kN / 64; ++w) {
      const int key = place.key_begin + w * 64;
      if (key < plain.first || key + 64 > plain.end || args.alibi_slopes.data) tile.masked |= 1u << w;
    }
    if (args.cu_seqlens_q && row + Tile::kM > place.row_end) tile.masked |= PublishedTile::kRagged;
    if (is_first) tile.store(shared.tile(stage));

    const std::int64_t first_term = std::int64_t(row_tile) * Tile::kM;
    const auto rows =
        Storage::template find_rows<RowTile>(tensors.query, args, place.sequence, place.batch, row_head, row);
    const auto load_rows = [&](std::uint32_t to, const auto& from, std::uint32_t barrier) {
      Storage::template load_rows<RowTile>(to, from, args, place.sequence, place.batch, row_head, rows, barrier,
                                           kEvictLast);
    };
    Storage::announce(shared.query_full(stage), RowTile::kBytes, kTermBytes);
    load_rows(shared.query(stage), tensors.query, shared.query_full(stage));
    load_terms(shared.offset(stage), args.offset + first_term, shared.query_full(stage));
    Storage::finish(shared.query_full(stage));

    wait(shared.grad_output_empty(stage), before);
    Storage::announce(shared.grad_output_full(stage), RowTile::kBytes, kHasDelta * kTermBytes);
    load_rows(shared.grad_output(stage), tensors.grad_output, shared.grad_output_full(stage));
    if constexpr (kHasDelta) load_terms(shared.delta(stage), args.delta + first_term, shared.grad_output_full(stage));
    Storage::finish(shared.grad_output_full(stage));
  });
  wait(shared.query_empty(step.stage()), step.parity() ^ 1);
  if (is_first) PublishedTile{-1, 0, 0, 0, 0, 0, 1}.store(shared.tile(step.stage()));
  Storage::announce_none(shared.query_full(step.stage()));
}

}  // namespace attnx::cuda
