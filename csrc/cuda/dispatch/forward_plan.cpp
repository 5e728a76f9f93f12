#include <algorithm>
#include <stdexcept>

#include "cuda/dispatch/plan.h"
#include "cuda/dispatch/splits.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/dispatch/why_not_tma.h"
#include "cuda/dispatch/workspace.h"
#include "cuda/head_dims.h"
#include "cuda/logits/terms.h"
#include "cuda/mainloop/sm80/tables_tile_sizes.h"
#include "cuda/mainloop/sm90/tile_sizes.h"
#include "cuda/storage/tma_views.h"

namespace attnx::cuda {

namespace {

template <class Tile>
TileSizes sizes_of(Tile) {
  return {Tile::kM, Tile::kN, Tile::kBlocksPerSm, Tile::kSharedBytes, 0};
}

template <const auto& kTable, template <int> class TilesOf>
void plan_sm80(const ForwardParams& p, ForwardPlan& plan) {
  plan.head_dim = padded_head_dim<kTable>(p);
  const std::int64_t rows = heads_in_tile(p) * p.length_q;
  with_head_dim<kTable>(p, [&]<int kHeadDim>() {
    using Tiles = TilesOf<kHeadDim>;
    const bool listed = plan.variant.listed;
    const auto wide = listed ? sizes_of(typename Tiles::WideListed()) : sizes_of(typename Tiles::Wide());
    const auto narrow = sizes_of(typename Tiles::Narrow());
    const bool fills = listed ? divides<typename Tiles::WideListed>(p.block_q, p.block_k) : rows > narrow.rows;
    plan.variant.wide = fills && plan.variant.aligned && wide.shared_bytes <= current_device().shared_bytes;
    plan.tile = plan.variant.wide ? wide : narrow;
  });
  static_cast<Geometry&>(plan.geometry) = geometry_of(p, plan.tile.rows, heads_in_tile(p));
}

// It returns what speaks against sm_90's mainloop, or nothing.
template <const auto& kTable, template <int> class TilesOf>
std::string plan_sm90(const ForwardParams& p, ForwardPlan& plan) {
  plan.head_dim = padded_head_dim<kTable>(p);
  with_head_dim<kTable>(p, [&]<int kHeadDim>() {
    using Tiles = TilesOf<kHeadDim>;
    plan.tile = plan.variant.listed
                    ? Tiles::Listed::choose(p.block_q, p.block_k, []<class Tile>(Tile tile) { return sizes_of(tile); })
                    : sizes_of(typename Tiles::Dense());
  });
  const std::int64_t group = whole_heads_in_tile(p, plan.tile.rows), rows = p.length_q * group;
  static_cast<Geometry&>(plan.geometry) = geometry_of(p, plan.tile.rows, group);
  if (!ATTNX_CUDA_SM90) return "attnx was built without it";
  if (!has_sm90(p.score)) return kScoreReason;
  if (!plan.variant.listed && rows <= 64)
    return "at most 64 rows of query share their keys, got " + std::to_string(rows);
  const TmaForwardViews views = tma_views(p, group);
  if (const std::string why = why_not_tma({{"query", views.query}, {"key", views.key}, {"value", views.value}});
      !why.empty())
    return why;
  if (!is_aligned(p, p.output, p.heads_q, p.value_dim)) return "the rows of output are not multiples of 16 bytes";
  return {};
}

int splits_of(const ForwardParams& p, const ForwardPlan& plan) {
  if (plan.variant.listed) return 1;
  const std::int64_t rows = p.length_q * plan.geometry.group.divisor();
  const std::int64_t seen = std::min<std::int64_t>(p.length_k, std::int64_t(plan.geometry.left) + plan.geometry.right +
                                                                   std::min<std::int64_t>(rows, plan.tile.rows));
  return choose_splits(plan.tiles, ceil_div(seen, plan.tile.keys), current_device().sm_count * plan.tile.blocks_per_sm);
}

}  // namespace

ForwardPlan make_plan(const ForwardParams& p, std::optional<Mainloop> asked, void* workspace) {
  ForwardPlan plan;
  plan.variant.listed = p.key_blocks.counts;
  plan.variant.block_q = p.block_q;
  plan.variant.block_k = p.block_k;
  plan.variant.terms = has_terms(p);
  plan.variant.tables = p.terms.tables.index;
  plan.variant.aligned =
      are_aligned(p, {p.query}, {p.key}, {p.value}) && is_aligned(p, p.output, p.heads_q, p.value_dim);
  const auto on_sm80 = [&] {
    if (is_band_only(p.score)) return plan_sm80<kBandHeadDims, ForwardTiles>(p, plan);
    if (plan.variant.tables) return plan_sm80<kTermsHeadDims, TablesForwardTiles>(p, plan);
    plan.variant.terms ? plan_sm80<kTermsHeadDims, TermsForwardTiles>(p, plan)
                       : plan_sm80<kHeadDims, ForwardTiles>(p, plan);
  };
  const auto on_sm90 = [&]() -> std::string {
    if (!plan.variant.terms) return plan_sm90<kTmaHeadDims, TmaForwardTiles>(p, plan);
    if (plan.variant.tables) return "it has no tables by distance";
    constexpr int kMost = *(std::end(kTermsTmaHeadDims) - 1);
    if (const auto wanted = std::max(p.head_dim, p.value_dim); wanted > kMost)
      return "calls with terms in their logits have at most " + std::to_string(kMost) + " features there, got " +
             std::to_string(wanted);
    return plan_sm90<kTermsTmaHeadDims, TermsTmaForwardTiles>(p, plan);
  };
  plan_mainloop("call", asked, plan, on_sm80, on_sm90);

  plan.tiles = p.batch * plan.geometry.heads.divisor() * plan.geometry.query_blocks.divisor();
  const int splits = splits_of(p, plan);
  plan.geometry.splits = Divisor(splits);
  WorkspaceLayout layout;
  if (splits > 1) {
    const std::int64_t partial_rows = splits * plan.tiles * plan.tile.rows;
    plan.partial.output = layout.place<float>(workspace, partial_rows * plan.head_dim);
    if (is_normalised(p.score)) plan.partial.logsumexp = layout.place<float>(workspace, partial_rows);
  }
  if (plan.mainloop == Mainloop::kSm90) plan.taken = layout.place<int>(workspace, 1);
  plan.workspace = layout.bytes();
  return plan;
}

}  // namespace attnx::cuda
