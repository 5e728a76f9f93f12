#include "cluster_loop.h"

#include <stdexcept>
#include <string>

#include "cuda/head_dims.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/routing/cluster_tiles.h"

namespace attnx::cuda {

void check_mainloop(std::optional<Mainloop> asked) {
  if (asked == Mainloop::kSm90)
    throw std::runtime_error(
        std::string("cuda_mainloop: expected a call that sm90 serves, got one that it does not: ") + kWhyNotSm90);
}

SortedLists places_of(const Clusters& c, std::int64_t count, std::int64_t heads, WorkspaceLayout& layout,
                      void* workspace) {
  auto* places = layout.place<std::int32_t>(workspace, heads * c.slots);
  auto* starts = layout.place<std::int32_t>(workspace, heads * (c.rows + 1));
  return {heads, c.slots, c.rows, c.indices, c.offsets + count, count + 1, places, starts};
}

GatheredTensor gathered_queries(const AttentionParams& p, const Tensor& x) {
  const Clusters& c = p.gather->queries;
  return {x, {}, 0, c.indices, c.slots, p.heads_q, Divisor(1)};
}

GatheredTensor gathered_keys(const AttentionParams& p, const Tensor& own, const Tensor& memory) {
  const Clusters& c = p.gather->keys;
  return {own, memory, int(p.gather->memory), c.indices, c.slots, p.heads_q, Divisor(p.heads_q / p.heads_k)};
}

Geometry geometry_of_heads(const AttentionParams& p) {
  Geometry g{};
  g.batch = p.batch;
  g.heads_q = g.heads_k = p.heads_q;
  g.length_q = p.length_q;
  g.length_k = p.length_k;
  g.head_dim = p.head_dim;
  g.value_dim = p.value_dim;
  g.heads = Divisor(p.heads_q);
  g.tiles_of_block = 1;
  g.left = g.right = kUnbounded;
  return g;
}

bool are_gathers_aligned(const AttentionParams& p) {
  const Gather& g = *p.gather;
  return are_aligned(p, {p.query}, {p.key}, {p.value}) &&
         (g.memory == 0 || are_aligned(p, {}, {g.memory_key}, {g.memory_value}));
}

bool are_clusters_short(const AttentionParams& p) {
  constexpr std::int64_t kRows = 64;
  return p.gather->queries.slots <= kRows * p.gather->clusters;
}

ClusterTileSizes::ClusterTileSizes(const AttentionParams& p) : wide(!are_gathers_aligned(p) || !are_clusters_short(p)) {
  with_head_dim<kRoutedHeadDims>(p, [&]<int kHeadDim>() {
    using Tiles = ForwardTiles<kHeadDim>;
    rows = wide ? Tiles::Wide::kM : Tiles::Narrow::kM;
    keys = wide ? Tiles::Wide::kN : Tiles::Narrow::kN;
    head_dim = kHeadDim;
  });
}

ClusterLoop::ClusterLoop(const AttentionParams& p, WorkspaceLayout& layout, void* workspace)
    : ClusterTileSizes(p),
      heads(p.batch * p.heads_q),
      tiles(heads, most_cluster_tiles(p.gather->queries.slots, p.gather->clusters, rows), layout, workspace) {
  const std::int64_t slots = p.gather->queries.slots, features = padded_features(p.value_dim);
  if (p.window_right == 0) ends = layout.place<std::int32_t>(workspace, heads * slots);
  output = by_slot(layout.place<std::uint16_t>(workspace, heads * slots * features), p.heads_q, slots, features);
}

ClusterTilesArguments cluster_tiles(const AttentionParams& p, int rows, int keys, std::int64_t row_tiles) {
  const Gather& g = *p.gather;
  ClusterTilesArguments args{};
  args.clusters = int(g.clusters);
  args.memory = int(g.memory);
  args.query_offsets = g.queries.offsets;
  args.key_offsets = g.keys.offsets;
  args.rows_of_tile = rows;
  args.keys_of_tile = keys;
  args.is_causal = p.window_right == 0;
  args.heads = p.batch * p.heads_q;
  args.row_tiles = row_tiles;
  return args;
}

void ClusterLoop::prepare(const AttentionParams& p, cudaStream_t stream) const {
  const Gather& g = *p.gather;
  if (tiles.count() == 0) return;
  tiles.make(cluster_tiles(p, rows, 0, tiles.tiles), stream);
  if (ends)
    launch_cluster_ends({tiles.table, tiles.count(), rows, int(g.memory), g.keys.rows - g.queries.rows,
                         g.queries.indices, g.keys.indices, g.queries.slots, g.keys.slots, ends},
                        stream);
}

void ClusterLoop::run(const ForwardParams& p, cudaStream_t stream) const {
  const Gather& g = *p.gather;
  const RoutedForwardCall call{p,
                               {geometry_of_heads(p), {}},
                               scaling_of(p),
                               gathered_queries(p, p.query),
                               gathered_keys(p, p.key, g.memory_key),
                               gathered_keys(p, p.value, g.memory_value),
                               output,
                               p.logsumexp.data ? by_slot(p.logsumexp.data, p.heads_q, g.queries.slots, 1) : Tensor{},
                               row_table(p),
                               are_gathers_aligned(p),
                               wide,
                               tiles.count(),
                               stream};
  with_dtype(p.dtype, [&]<DType kDType>() {
    with_head_dim<kRoutedHeadDims>(p, [&]<int kHeadDim>() {
      p.score == Score::kSigmoid ? launch_routed_forward_sm80<Score::kSigmoid, kDType, kHeadDim>(call)
                                 : launch_routed_forward_sm80<Score::kSoftmax, kDType, kHeadDim>(call);
    });
  });
}

}  // namespace attnx::cuda
