// This says which tiles clusters have. It is plain data, which a kernel fills in, because only the device knows how
// long clusters are.
#pragma once

#include <cstdint>

namespace attnx::cuda {

// This is one tile of one cluster, of rows or of keys.
struct ClusterTile {
  int head;               // of the whole batch; -1: there is no such tile
  int cluster, begin;     // begin: the tile's first row, or key, in the cluster
  int first_q, length_q;  // the cluster's slots among those of the head
  int first_k, length_k;  // length_k counts the memory's keys as well
  int first_row_tile;     // the cluster's first tile of rows, among those of all heads
};

struct ClusterTable {
  const ClusterTile* table;  // one tile a block
  const std::int32_t* ends;  // [batch, heads, slots]: how many keys a query sees; null: all of its cluster
  std::int64_t slots;        // of the queries of a head
};

}  // namespace attnx::cuda
