// This is the producer of the forward: the threads that have the tiles of a storage brought to shared memory.
#pragma once

#include "cuda/mainloop/sm90/forward_memory.h"
#include "cuda/mainloop/sm90/forward_places.h"

namespace attnx::cuda {

// The first producer takes the next tile of rows for all of them.
template <int kProducers>
__device__ __forceinline__ int take_tile(int* taken) {
  if (kProducers > 1 && threadIdx.x > 0) return 0;
  return gridDim.x + atomicAdd(taken, 1);
}
// It shares that tile with the others. They use two words in turn, so that none is written while one still reads it.
template <int kProducers>
__device__ __forceinline__ int share_tile(int taken, std::uint32_t word) {
  if constexpr (kProducers == 1) return taken;
  if (threadIdx.x == 0) store_shared(word, std::uint32_t(taken));
  meet(5, kProducers);
  return int(load_shared_word(word));
}

template <class Tiles, class Storage, class Tile, class Args>
__device__ __forceinline__ void produce(const Args& args, const ForwardMemory<Tile>& shared) {
  using KeyTile = typename ForwardMemory<Tile>::KeyTile;
  using QueryTile = typename ForwardMemory<Tile>::QueryTile;
  const auto& tensors = args.tensors;
  Storage::prepare(tensors);
  Ring<Tile::kStages> keys, values;
  std::uint32_t query_phase = 0;
  int tile = blockIdx.x, turn = 0;

  const auto publish = [&](int row_tile) {
    wait(shared.query_empty(), query_phase ^ 1);
    query_phase ^= 1;
    if (Storage::kProducers == 1 || threadIdx.x == 0) store_shared(shared.row_tile(), std::uint32_t(row_tile));
  };

  while (tile < args.row_tiles) {
    const int taken = take_tile<Storage::kProducers>(args.taken);  // well before it is needed
    const auto place = nth_place<Tiles>(args, tile, Tile());
    if (Tiles::kHasPlaces && place.row_begin >= place.row_end) break;  // a table ends with tiles that do not exist
    if (place.row_begin < place.row_end) {
      const auto tiles = Tiles::template keys<Tile>(args, place);
      const int count = tiles.end() - tiles.begin();
      const int key_head = key_head_of(args, place.head);
      const auto first_key = [&](int i) { return tiles.first(tiles.end() - 1 - i); };
      const auto find_keys = [&](int key) {
        return Storage::template find_keys<KeyTile>(tensors.key, args, place.sequence, place.batch, key_head, key);
      };
      using Keys = typename Storage::template Rows<KeyTile>;
      // What is in memory is read a step before it is needed.
      Keys ahead{}, behind{};

      const auto load_key = [&](int i) {
        const Keys key = ahead;
        if (i + 1 < count) ahead = find_keys(first_key(i + 1));
        wait(shared.key_empty(keys.stage), keys.phase ^ 1);
        if constexpr (Tiles::kFromMemory) {
          const int at = tiles.end() - 1 - i;
          store_shared(shared.key_tile(keys.stage),
                       make_uint4(key, __float_as_uint(tiles.bias(at)), __float_as_uint(tiles.divisor(at)), 0));
        }
        const std::uint32_t barrier = shared.key_full(keys.stage);
        Storage::announce(barrier, KeyTile::kBytes);
        Storage::template load_keys<KeyTile>(shared.key(keys.stage), tensors.key, args, place.sequence, place.batch,
                                             key_head, key, barrier, kEvictLast);
        Storage::finish(barrier);
        keys.advance();
        return key;
      };
      const auto load_value = [&](const Keys& key) {
        wait(shared.value_empty(values.stage), values.phase ^ 1);
        const std::uint32_t barrier = shared.value_full(values.stage);
        Storage::announce(barrier, KeyTile::kBytes);
        Storage::template load_keys<KeyTile>(shared.value(values.stage), tensors.value, args, place.sequence,
                                             place.batch, key_head, key, barrier, kEvictLast);
        Storage::finish(barrier);
        values.advance();
      };

      const auto rows = Storage::template find_rows<QueryTile>(tensors.query, args, place.sequence, place.batch,
                                                               place.head, place.row_begin);
      if (count > 0) {
        ahead = find_keys(first_key(0));
        behind = load_key(0);
      }
      publish(tile);
      Storage::announce(shared.query_full(), QueryTile::kBytes);
      Storage::template load_rows<QueryTile>(shared.query, tensors.query, args, place.sequence, place.batch, place.head,
                                             rows, shared.query_full(), kEvictFirst);
      Storage::finish(shared.query_full());
#pragma unroll 1
      for (int i = 1; i < count; ++i) {
        const Keys key = load_key(i);
        load_value(behind);
        behind = key;
      }
      if (count > 0) load_value(behind);
    }
    tile = share_tile<Storage::kProducers>(taken, shared.next_row_tile(turn));
    turn ^= 1;
  }
  publish(-1);
  Storage::announce_none(shared.query_full());
}

}  // namespace attnx::cuda
