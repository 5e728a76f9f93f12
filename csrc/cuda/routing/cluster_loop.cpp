#include "cluster_loop.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/dispatch/plan.h"
#include "cuda/head_dims.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/mainloop/sm90/tile_sizes.h"
#include "cuda/routing/cluster_tiles.h"

namespace attnx::cuda {

SortedLists places_of(const Clusters& c, std::int64_t count, std::int64_t heads, WorkspaceLayout& layout,
                      void* workspace) {
  auto* places = layout.place<std::int32_t>(workspace, heads * c.slots);
  auto* starts = layout.place<std::int32_t>(workspace, heads * (c.rows + 1));
  return {heads, c.slots, c.rows, c.indices, c.offsets + count, count + 1, places, starts};
}

GatheredTensor gathered_queries(const AttentionParams& p, const Tensor& x, std::int64_t features) {
  const Clusters& c = p.gather->queries;
  return {x, {}, 0, int(features), c.indices, c.slots, p.heads_q, Divisor(1)};
}

GatheredTensor gathered_keys(const AttentionParams& p, const Tensor& own, const Tensor& memory, std::int64_t features) {
  const Clusters& c = p.gather->keys;
  return {own,     memory,    int(p.gather->memory),         int(features), c.indices,
          c.slots, p.heads_q, Divisor(p.heads_q / p.heads_k)};
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

bool are_gathers_near(const AttentionParams& p) {
  const Gather& g = *p.gather;
  const auto is_near = [](const Tensor& x) { return x.row_stride < std::int64_t(1) << 30; };
  return is_near(p.query) && is_near(p.key) && is_near(p.value) &&
         (g.memory == 0 || (is_near(g.memory_key) && is_near(g.memory_value)));
}

bool are_gathers_aligned(const AttentionParams& p) {
  const Gather& g = *p.gather;
  return are_gathers_near(p) && are_aligned(p, {p.query}, {p.key}, {p.value}) &&
         (g.memory == 0 || are_aligned(p, {}, {g.memory_key}, {g.memory_value}));
}

bool are_clusters_short(const AttentionParams& p) {
  constexpr std::int64_t kRows = 64;
  return p.gather->queries.slots <= kRows * p.gather->clusters;
}

std::string why_not_gather_on_sm90(const AttentionParams& p) {
  if (!ATTNX_CUDA_SM90) return "attnx was built without it";
  if (!are_gathers_near(p)) return "rows are 2^31 bytes apart, or more";
  if (!are_gathers_aligned(p)) return "rows do not start on 16 bytes, or are not multiples of them";
  return {};
}

ClusterTileSizes::ClusterTileSizes(const AttentionParams& p, std::optional<Mainloop> asked) {
  const auto use = [&]<class Tile>(Tile) {
    rows = Tile::kM;
    keys = Tile::kN;
    head_dim = Tile::kHeadDim;
  };
  const auto plan_sm80 = [&]<int kHeadDim>() {
    using Tiles = ForwardTiles<kHeadDim>;
    wide = !are_gathers_aligned(p) || !are_clusters_short(p);
    wide ? use(typename Tiles::Wide()) : use(typename Tiles::Narrow());
  };
  const auto plan_sm90 = [&]<int kHeadDim>() {
    use(typename TmaForwardTiles<kHeadDim>::Gathered());
    const std::string why = why_not_gather_on_sm90(p);
    return why.empty() && are_clusters_short(p) ? "clusters have at most 64 queries in the mean" : why;
  };
  with_head_dim<kRoutedHeadDims>(p, [&]<int kHeadDim>() {
    plan_mainloop(
        "call", asked, *this, [&] { plan_sm80.template operator()<kHeadDim>(); },
        [&] { return plan_sm90.template operator()<kHeadDim>(); });
  });
}

ClusterLoop::ClusterLoop(const AttentionParams& p, std::optional<Mainloop> asked, WorkspaceLayout& layout,
                         void* workspace)
    : ClusterTileSizes(p, asked),
      heads(p.batch * p.heads_q),
      tiles(heads, most_cluster_tiles(p.gather->queries.slots, p.gather->clusters, rows), layout, workspace) {
  const std::int64_t slots = p.gather->queries.slots, features = padded_features(p.value_dim);
  if (mainloop == Mainloop::kSm90) taken = layout.place<int>(workspace, 1);
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
    launch_cluster_ends(
        {tiles.table, tiles.count(), rows, int(g.memory), g.keys.rows - g.queries.rows, g.leads, p.heads_q, g.sequences,
         g.clusters / g.sequences, g.queries.indices, g.keys.indices, g.queries.slots, g.keys.slots, ends},
        stream);
}

void ClusterLoop::run(const ForwardParams& p, cudaStream_t stream) const {
  const Gather& g = *p.gather;
  std::int64_t blocks = tiles.count();
  ForwardSchedule schedule{};
  if (mainloop == Mainloop::kSm90 && blocks > 0) {  // they stay
    schedule = {int(blocks), {}, taken};
    check(cudaMemsetAsync(taken, 0, sizeof *taken, stream), "cudaMemsetAsync");
    blocks = std::min<std::int64_t>(blocks, current_device().sm_count);
  }
  const RoutedForwardCall call{p,
                               {geometry_of_heads(p), {}},
                               scaling_of(p),
                               gathered_queries(p, p.query, p.head_dim),
                               gathered_keys(p, p.key, g.memory_key, p.head_dim),
                               gathered_keys(p, p.value, g.memory_value, p.value_dim),
                               output,
                               p.logsumexp.data ? by_slot(p.logsumexp.data, p.heads_q, g.queries.slots, 1) : Tensor{},
                               row_table(p),
                               schedule,
                               are_gathers_aligned(p),
                               wide,
                               blocks,
                               stream};
  with_dtype(p.dtype, [&]<DType kDType>() {
    with_head_dim<kRoutedHeadDims>(p, [&]<int kHeadDim>() {
      const auto launch = [&]<Score kScore>() {
        if (mainloop == Mainloop::kSm80) {
          launch_routed_forward_sm80<kScore, kDType, kHeadDim>(call);
        } else if constexpr (ATTNX_CUDA_SM90) {
          launch_routed_forward_sm90<kScore, kDType, kHeadDim>(call);
        }
      };
      p.score == Score::kSigmoid ? launch.template operator()<Score::kSigmoid>()
                                 : launch.template operator()<Score::kSoftmax>();
    });
  });
}

}  // namespace attnx::cuda
