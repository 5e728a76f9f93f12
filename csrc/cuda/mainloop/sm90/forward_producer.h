// This is the producer of the forward: the threads that have the tiles of a storage brought to shared memory.
#pragma once

#include "cuda/mainloop/forward_rows.h"
#include "cuda/mainloop/sm90/forward_arguments.h"
#include "cuda/mainloop/sm90/forward_memory.h"

namespace attnx::cuda {

// This takes the next tile of rows, which is the same for all producers.
template <int kProducers>
__device__ __forceinline__ int take_tile(int* taken) {
  static_assert(kProducers == 1 || kProducers == 32);
  if constexpr (kProducers == 1) return gridDim.x + atomicAdd(taken, 1);
  int tile = 0;
  if (threadIdx.x == 0) tile = gridDim.x + atomicAdd(taken, 1);
  return __shfl_sync(~0u, tile, 0);
}

template <class Tiles, class Storage, class Tile, class Args>
__device__ __forceinline__ void produce(const Args& args, const ForwardMemory<Tile>& shared) {
  using KeyTile = typename ForwardMemory<Tile>::KeyTile;
  using QueryTile = typename ForwardMemory<Tile>::QueryTile;
  const auto& tensors = args.tensors;
  Storage::prepare(tensors);
  Ring<Tile::kStages> keys, values;
  std::uint32_t query_phase = 0;
  int tile = blockIdx.x;

  const auto publish = [&](int row_tile) {
    wait(shared.query_empty(), query_phase ^ 1);
    query_phase ^= 1;
    store_shared(shared.row_tile(), std::uint32_t(row_tile));
  };

  while (tile < args.row_tiles) {
    const int next = take_tile<Storage::kProducers>(args.taken);  // it is taken well before it is needed
    const ForwardPlace place = ForwardPlace::of(args, args.in_order(tile), Tile());
    if (place.row_begin < place.row_end) {
      const auto tiles = Tiles::template keys<Tile>(args, place);
      const int count = tiles.end() - tiles.begin();
      const int key_head = key_head_of(args, place.head);
      const auto first_key = [&](int i) { return tiles.first(tiles.end() - 1 - i); };
      int ahead = count > 0 ? first_key(0) : 0;  // where it is in memory, it is read a step before it is needed
      int behind = 0;

      const auto load_key = [&](int i) {
        const int key = ahead;
        if (i + 1 < count) ahead = first_key(i + 1);
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
      const auto load_value = [&](int key) {
        wait(shared.value_empty(values.stage), values.phase ^ 1);
        const std::uint32_t barrier = shared.value_full(values.stage);
        Storage::announce(barrier, KeyTile::kBytes);
        Storage::template load_keys<KeyTile>(shared.value(values.stage), tensors.value, args, place.sequence,
                                             place.batch, key_head, key, barrier, kEvictLast);
        Storage::finish(barrier);
        values.advance();
      };

      if (count > 0) behind = load_key(0);
      publish(tile);
      Storage::announce(shared.query_full(), QueryTile::kBytes);
      Storage::template load_rows<QueryTile>(shared.query, tensors.query, args, place.sequence, place.batch, place.head,
                                             place.row_begin, shared.query_full(), kEvictFirst);
      Storage::finish(shared.query_full());
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
  publish(-1);
  arrive(shared.query_full());
}

}  // namespace attnx::cuda
