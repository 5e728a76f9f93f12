// This lists the tiles of clusters, whose lengths only the device knows, and what their queries see.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/tiles/cluster_tile.h"

namespace attnx::cuda {

struct ClusterTilesArguments {
  int clusters, memory;
  const std::int32_t *query_offsets, *key_offsets;  // [heads, clusters + 1]
  int rows_of_tile, keys_of_tile;                   // where one is 0, the tiles are those of the other
  bool is_causal;
  std::int64_t heads, row_tiles, tiles;  // of a head: row_tiles and tiles are bounds
  ClusterTile* table;                    // [heads, tiles]: by cluster, and then those that do not exist
  // Where they are not null, these are what orders tiles by work, the longest first, and their numbers in the table. Of
  // two tiles of keys of a cluster, the former is not less work.
  std::uint32_t* order_keys;
  std::int32_t* order_items;
};

// This is how many tiles the slots of a head fill at most, each in `clusters` parts.
inline std::int64_t most_cluster_tiles(std::int64_t slots, std::int64_t clusters, int of_tile) {
  return slots / of_tile + (clusters < slots ? clusters : slots);
}

void launch_cluster_tiles(const ClusterTilesArguments& args, cudaStream_t stream);

struct ClusterEndsArguments {
  const ClusterTile* table;  // of rows
  std::int64_t tiles;        // of all heads
  int rows_of_tile, memory;
  std::int64_t lead;                        // of a key's row over a query's that stand at one time; not with leads
  const std::int32_t* leads;                // [batch, sequences], or null
  std::int64_t heads, sequences, clusters;  // heads of an entry of the batch, and clusters of a sequence
  const std::int32_t *queries, *keys;       // [heads, slots]
  std::int64_t query_slots, key_slots;
  std::int32_t* ends;  // [heads, query_slots]: ClusterBand::ends under a causal mask
};

void launch_cluster_ends(const ClusterEndsArguments& args, cudaStream_t stream);

}  // namespace attnx::cuda
