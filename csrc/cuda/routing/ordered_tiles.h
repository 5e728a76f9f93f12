// This orders the tiles of clusters of all heads by work, the longest first, so that no long one starts when the rest
// of the device is about to end.
#pragma once

#include "cuda/routing/cluster_tiles.h"
#include "cuda/routing/sorted_pairs.h"

namespace attnx::cuda {

struct OrderedTiles {
  std::int64_t heads, tiles;       // of the whole batch; of a head, at most
  ClusterTile *unordered, *table;  // [heads * tiles]
  SortedPairs by_work;

  OrderedTiles(std::int64_t heads, std::int64_t tiles, WorkspaceLayout& layout, void* workspace);

  std::int64_t count() const { return heads * tiles; }
  // This fills in the table. Tiles of a cluster that are as much work stay in their order.
  void make(const ClusterTilesArguments& clusters, cudaStream_t stream) const;
};

}  // namespace attnx::cuda
