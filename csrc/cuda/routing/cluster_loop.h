// This is the forward loop over clusters, with the tables before it. It leaves what each slot of a cluster has.
#pragma once

#include <string>

#include "cuda/dispatch/tiling.h"
#include "cuda/dispatch/workspace.h"
#include "cuda/routing/ordered_tiles.h"
#include "cuda/routing/sorted_lists.h"
#include "cuda/units/routed_call.h"

namespace attnx::cuda {

// These are tensors by slot, of all heads, whose rows lie on 16 bytes where they hold `features` in 16 bits.
inline std::int64_t padded_features(std::int64_t features) { return ceil_div(features, 8) * 8; }
inline Tensor by_slot(void* data, std::int64_t heads, std::int64_t slots, std::int64_t features) {
  return {data, heads * slots * features, slots * features, features};
}

// This is the inverse of clusters: which slots hold a row.
SortedLists places_of(const Clusters& clusters, std::int64_t count, std::int64_t heads, WorkspaceLayout& layout,
                      void* workspace);

// These gather rows of queries, or of keys behind those of the memory.
GatheredTensor gathered_queries(const AttentionParams& params, const Tensor& x, std::int64_t features);
GatheredTensor gathered_keys(const AttentionParams& params, const Tensor& own, const Tensor& memory,
                             std::int64_t features);
// Every query head has tiles of its own.
Geometry geometry_of_heads(const AttentionParams& params);
// These tell whether the bytes from a row to the next fit in 32 bits, and whether rows lie on 16 bytes besides.
bool are_gathers_near(const AttentionParams& params);
bool are_gathers_aligned(const AttentionParams& params);

// This tells whether most clusters are shorter than a wide tile has rows.
bool are_clusters_short(const AttentionParams& params);
// This returns what speaks against gathering rows on sm_90, or nothing.
std::string why_not_gather_on_sm90(const AttentionParams& params);

// These are the clusters of a call, in tiles of so many rows or, where keys is not 0, of keys; row_tiles bounds how
// many of rows a head has.
ClusterTilesArguments cluster_tiles(const AttentionParams& params, int rows, int keys, std::int64_t row_tiles);

struct ClusterTileSizes {
  Mainloop mainloop = Mainloop::kSm80;
  std::string why_not_sm90;  // on a device that could run it
  bool wide = true;
  int rows = 0, keys = 0, head_dim = 0;

  // It throws std::runtime_error where sm_90's loop is asked for in vain.
  ClusterTileSizes(const AttentionParams& params, std::optional<Mainloop> asked);
};

struct ClusterLoop : ClusterTileSizes {
  std::int64_t heads;    // of the whole batch
  OrderedTiles tiles;    // of rows
  int* taken = nullptr;  // of sm_90's schedule
  std::int32_t* ends = nullptr;
  Tensor output;  // by slot

  ClusterLoop(const AttentionParams& params, std::optional<Mainloop> asked, WorkspaceLayout& layout, void* workspace);

  ClusterTable row_table(const AttentionParams& p) const { return {tiles.table, ends, p.gather->queries.slots}; }
  // This fills in the tables.
  void prepare(const AttentionParams& params, cudaStream_t stream) const;
  // The logsumexp of the params is by slot, and their output is not written.
  void run(const ForwardParams& params, cudaStream_t stream) const;
};

}  // namespace attnx::cuda
