#include "attnx/policies.h"
#include "cuda/dispatch/plan.h"
#include "cuda/dispatch/range.h"
#include "cuda/head_dims.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/mainloop/sm90/backward_tile_sizes.h"
#include "cuda/routing/attention.h"
#include "cuda/routing/cluster_loop.h"
#include "cuda/routing/cluster_row_terms.h"
#include "cuda/routing/cluster_tiles.h"
#include "cuda/routing/memory_sums.h"
#include "cuda/routing/place_sums.h"
#include "cuda/routing/share_rows.h"

namespace attnx::cuda {

namespace {

std::int64_t most_key_tiles(const Gather& g, int keys) {
  return most_cluster_tiles(g.keys.slots + g.clusters * g.memory, g.clusters, keys);
}

struct BackwardTileSizes {
  Mainloop mainloop = Mainloop::kSm80;
  std::string why_not_sm90;  // on a device that could run it
  bool wide = false;
  int rows = 0, tile_keys = 0, head_dim = 0;

  // It throws std::runtime_error where sm_90's loop is asked for in vain.
  BackwardTileSizes(const BackwardParams& p, std::optional<Mainloop> asked) {
    const auto use = [&]<class Tile>(Tile) {
      rows = Tile::kM;
      tile_keys = Tile::kN;
      head_dim = Tile::kHeadDim;
    };
    const auto plan_sm80 = [&]<int kHeadDim>() {
      using Tiles = BackwardTiles<kHeadDim>;
      wide = are_gathers_aligned(p) && !are_clusters_short(p) &&
             Tiles::Wide::kSharedBytes <= current_device().shared_bytes;
      wide ? use(typename Tiles::Wide()) : use(typename Tiles::Narrow());
    };
    const auto plan_sm90 = [&]<int kHeadDim>() {
      using Tiles = TmaBackwardTiles<kHeadDim>;
      wide = !are_clusters_short(p);
      wide ? use(typename Tiles::Gathered()) : use(typename Tiles::GatheredNarrow());
      return why_not_gather_on_sm90(p);
    };
    with_head_dim<kRoutedHeadDims>(p, [&]<int kHeadDim>() {
      plan_mainloop(
          "backward", asked, *this, [&] { plan_sm80.template operator()<kHeadDim>(); },
          [&] { return plan_sm90.template operator()<kHeadDim>(); });
    });
  }
};

struct RoutedBackward : BackwardTileSizes {
  WorkspaceLayout layout;
  ClusterLoop loop;  // its output is computed again, because only the sums over clusters were kept
  SortedLists queries, keys;
  char *sort_queries, *sort_keys;

  std::int64_t row_tiles;  // of a head, at most
  ClusterTile* row_table;  // by cluster: sums over tiles of rows lie in this order
  OrderedTiles key_tiles;
  void* shares;  // of the gradient of the output
  BackwardScratch scratch{};
  std::size_t zeros_bytes;
  Tensor grad_query;
  KeyPlaces grad_key, grad_value;

  RoutedBackward(const BackwardParams& p, std::optional<Mainloop> asked, bool deterministic, void* workspace)
      : BackwardTileSizes(p, asked),
        loop(p, asked, layout, workspace),
        queries(places_of(p.gather->queries, p.gather->clusters, loop.heads, layout, workspace)),
        keys(places_of(p.gather->keys, p.gather->clusters, loop.heads, layout, workspace)),
        sort_queries(layout.place<char>(workspace, std::int64_t(sort_into_lists_workspace(queries)))),
        sort_keys(layout.place<char>(workspace, std::int64_t(sort_into_lists_workspace(keys)))),
        row_tiles(most_cluster_tiles(p.gather->queries.slots, p.gather->clusters, rows)),
        row_table(layout.place<ClusterTile>(workspace, loop.heads * row_tiles)),
        key_tiles(loop.heads, most_key_tiles(*p.gather, tile_keys), layout, workspace) {
    const Gather& g = *p.gather;
    const std::int64_t heads = loop.heads;
    const std::int64_t features = padded_features(p.head_dim), value_features = padded_features(p.value_dim);
    shares = layout.place<std::uint16_t>(workspace, heads * g.queries.rows * value_features);

    const std::int64_t padded_rows = heads * row_tiles * rows;
    scratch.deterministic = deterministic;
    scratch.offset = layout.place<float>(workspace, padded_rows);
    if (is_normalised(p.score)) scratch.delta = layout.place<float>(workspace, padded_rows);
    const std::size_t zeros_begin = layout.bytes();
    scratch.grad_query_sum = layout.place<float>(workspace, padded_rows * head_dim);
    scratch.turns = layout.place<int>(workspace, heads * row_tiles);
    zeros_bytes = layout.bytes() - zeros_begin;

    const auto places = [&](std::int64_t slots, std::int64_t n) {
      return by_slot(layout.place<std::uint16_t>(workspace, heads * slots * n), p.heads_q, slots, n);
    };
    grad_query = places(g.queries.slots, features);
    grad_key = {places(g.keys.slots, features), places(g.clusters * g.memory, features), int(g.memory)};
    grad_value = {places(g.keys.slots, value_features), places(g.clusters * g.memory, value_features), int(g.memory)};
  }
};

ForwardParams forward_of(const BackwardParams& p) {
  ForwardParams forward;
  static_cast<AttentionParams&>(forward) = p;
  return forward;
}

void make_row_terms(const BackwardParams& p, const RoutedBackward& plan, cudaStream_t stream) {
  const Clusters& queries = p.gather->queries;
  if (is_normalised(p.score)) plan.loop.run(forward_of(p), stream);
  launch_cluster_row_terms({{plan.row_table, plan.loop.ends, queries.slots},
                            queries.rows,
                            plan.rows,
                            int(p.value_dim),
                            int(padded_features(p.value_dim)),
                            queries.indices,
                            plan.loop.output.data,
                            plan.shares,
                            static_cast<const float*>(p.logsumexp.data),
                            static_cast<const float*>(p.grad_logsumexp.data),
                            plan.scratch.offset,
                            plan.scratch.delta},
                           p, plan.loop.heads * plan.row_tiles, stream);
}

void run_loop(const BackwardParams& p, const RoutedBackward& plan, cudaStream_t stream) {
  const Gather& g = *p.gather;
  BackwardGeometry geometry{};
  static_cast<Geometry&>(geometry) = geometry_of_heads(p);
  const std::int64_t features = padded_features(p.value_dim);
  const RoutedBackwardCall call{
      geometry,
      scaling_of(p),
      plan.scratch,
      gathered_queries(p, p.query, p.head_dim),
      gathered_keys(p, p.key, g.memory_key, p.head_dim),
      gathered_keys(p, p.value, g.memory_value, p.value_dim),
      gathered_queries(p, by_slot(plan.shares, p.heads_q, g.queries.rows, features), p.value_dim),
      plan.grad_query,
      plan.grad_key,
      plan.grad_value,
      {plan.row_table, plan.loop.ends, g.queries.slots},
      {plan.key_tiles.table, plan.loop.ends, g.queries.slots},
      plan.loop.heads * plan.row_tiles,
      plan.key_tiles.count(),
      are_gathers_aligned(p),
      plan.wide,
      stream};
  with_dtype(p.dtype, [&]<DType kDType>() {
    with_head_dim<kRoutedHeadDims>(p, [&]<int kHeadDim>() {
      const auto launch = [&]<Score kScore>() {
        if (plan.mainloop == Mainloop::kSm80) {
          launch_routed_backward_sm80<kScore, kDType, kHeadDim>(call);
        } else if constexpr (ATTNX_CUDA_SM90) {
          launch_routed_backward_sm90<kScore, kDType, kHeadDim>(call);
        }
      };
      p.score == Score::kSigmoid ? launch.template operator()<Score::kSigmoid>()
                                 : launch.template operator()<Score::kSoftmax>();
    });
  });
}

}  // namespace

std::size_t routed_backward_workspace(const BackwardParams& p, const Launch& launch) {
  return RoutedBackward(p, launch.mainloop, launch.deterministic, nullptr).layout.bytes();
}

void routed_backward(const BackwardParams& p, const Launch& launch) {
  const Range range("attnx::routing_attention_backward");
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const RoutedBackward plan(p, launch.mainloop, launch.deterministic, launch.workspace);
  const Gather& g = *p.gather;
  if (plan.zeros_bytes)
    check(cudaMemsetAsync(plan.scratch.grad_query_sum, 0, plan.zeros_bytes, stream), "cudaMemsetAsync");
  sort_into_lists(plan.queries, plan.sort_queries, stream);
  sort_into_lists(plan.keys, plan.sort_keys, stream);
  plan.loop.prepare(p, stream);
  ClusterTilesArguments row_tiles = cluster_tiles(p, plan.rows, 0, plan.row_tiles);
  row_tiles.tiles = plan.row_tiles;
  row_tiles.table = plan.row_table;
  launch_cluster_tiles(row_tiles, stream);
  plan.key_tiles.make(cluster_tiles(p, plan.rows, plan.tile_keys, plan.row_tiles), stream);
  launch_share_rows({p.batch, p.heads_q, g.queries.rows, int(p.value_dim), int(padded_features(p.value_dim)),
                     plan.queries.offsets, p.grad_output, plan.shares},
                    p.dtype, stream);
  make_row_terms(p, plan, stream);
  run_loop(p, plan, stream);

  const auto add_up = [&](const Clusters& c, const SortedLists& places, std::int64_t features, int group,
                          const Tensor& from, const Tensor& to) {
    launch_place_sums(
        {p.batch, p.heads_q, c.rows, c.slots, int(features), group, places.items, places.offsets, from, to, false},
        p.dtype, stream);
  };
  const int group = int(p.heads_q / p.heads_k);
  add_up(g.queries, plan.queries, p.head_dim, 1, plan.grad_query, p.grad_query);
  add_up(g.keys, plan.keys, p.head_dim, group, plan.grad_key.own, p.grad_key);
  add_up(g.keys, plan.keys, p.value_dim, group, plan.grad_value.own, p.grad_value);
  const auto add_up_memory = [&](std::int64_t features, const Tensor& from, const Tensor& to) {
    launch_memory_sums({p.batch, p.heads_q, g.clusters, int(g.memory), int(features), group, from, to}, p.dtype,
                       stream);
  };
  add_up_memory(p.head_dim, plan.grad_key.memory, p.grad_memory_key);
  add_up_memory(p.value_dim, plan.grad_value.memory, p.grad_memory_value);
}

KernelDescription describe_routed(const BackwardParams& p) {
  const RoutedBackward plan(p, asked_mainloop(), false, nullptr);
  const std::string mainloop = name_of(plan.mainloop);
  return {"attnx_backward_" + mainloop, mainloop, plan.rows,        plan.tile_keys, plan.head_dim,
          are_gathers_aligned(p),       1,        plan.why_not_sm90};
}

}  // namespace attnx::cuda
