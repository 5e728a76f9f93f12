// The producer of the forward: the threads that have the tiles of a storage brought to shared memory.
#pragma once

#include "cuda/mainloop/forward_rows.h"
#include "cuda/mainloop/sm90/forward_arguments.h"
#include "cuda/mainloop/sm90/forward_memory.h"

namespace attnx::cuda {

template <class Tiles, class Storage, class Tile, class Args>
__device__ __forceinline__ void produce(const Args& args, const ForwardMemory<Tile>& shared) {
  using Memory = ForwardMemory<Tile>;
  const auto& tensors = args.tensors;
  Storage::prepare(tensors);
  Ring<Tile::kStages> keys, values;
  std::uint32_t query_phase = 0;
  int tile = blockIdx.x;

  const auto publish = [&](int row_tile, int bytes) {
    wait(shared.query_empty(), query_phase ^ 1);
    query_phase ^= 1;
    store_shared(shared.row_tile(), std::uint32_t(row_tile));
    arrive_expecting(shared.query_full(), bytes);
  };

  while (tile < args.row_tiles) {
    const int next = gridDim.x + atomicAdd(args.taken, 1);  // well before it is needed
    const ForwardPlace place = ForwardPlace::of(args, args.in_order(tile), Tile());
    if (place.row_begin < place.row_end) {
      const auto tiles = Tiles::template keys<Tile>(args, place);
      const int count = tiles.end() - tiles.begin();
      const int batch = args.cu_seqlens_q ? 0 : place.batch, head = key_head_of(args, place.head);
      const auto first_key = [&](int i) { return tiles.first(tiles.end() - 1 - i); };
      int ahead = count > 0 ? first_key(0) : 0;  // where it is in memory, it is read a step before it is needed
      int behind = 0;

      const auto load_key = [&](int i) {
        const int key = ahead;
        if (i + 1 < count) ahead = first_key(i + 1);
        wait(shared.key_empty(keys.stage), keys.phase ^ 1);
        if constexpr (Tiles::kFromMemory) {
          store_shared(shared.first_key(keys.stage), std::uint32_t(key));
          store_shared(shared.first_key(keys.stage) + 4, __float_as_uint(tiles.bias(tiles.end() - 1 - i)));
        }
        arrive_expecting(shared.key_full(keys.stage), Memory::KeyTile::kBytes);
        Storage::template load<typename Memory::KeyTile>(shared.key(keys.stage), tensors.key,
                                                         int(place.sequence.first_k) + key, head, batch,
                                                         shared.key_full(keys.stage), kEvictLast);
        keys.advance();
        return key;
      };
      const auto load_value = [&](int key) {
        wait(shared.value_empty(values.stage), values.phase ^ 1);
        arrive_expecting(shared.value_full(values.stage), Memory::KeyTile::kBytes);
        Storage::template load<typename Memory::KeyTile>(shared.value(values.stage), tensors.value,
                                                         int(place.sequence.first_k) + key, head, batch,
                                                         shared.value_full(values.stage), kEvictLast);
        values.advance();
      };

      if (count > 0) behind = load_key(0);
      publish(tile, Memory::QueryTile::kBytes);
      // Rows are (query, head of the group); where heads do not share a tile the one head stands among all.
      const int first_query = int(place.sequence.first_q) + args.group.divide(place.row_begin);
      Storage::template load<typename Memory::QueryTile>(shared.query, tensors.query, first_query, place.head, batch,
                                                         shared.query_full(), kEvictFirst);
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

}  // namespace attnx::cuda
