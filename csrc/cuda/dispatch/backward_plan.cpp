#include <algorithm>
#include <stdexcept>

#include "cuda/dispatch/plan.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/dispatch/why_not_tma.h"
#include "cuda/dispatch/workspace.h"
#include "cuda/head_dims.h"
#include "cuda/logits/terms.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/mainloop/sm90/backward_tile_sizes.h"
#include "cuda/storage/tma_views.h"
#include "cuda/units/sums_call.h"

namespace attnx::cuda {

namespace {

template <const auto& kTable, template <int> class TilesOf>
void plan_sm80(const BackwardParams& p, BackwardPlan& plan) {
  plan.head_dim = padded_head_dim<kTable>(p);
  with_head_dim<kTable>(p, [&]<int kHeadDim>() {
    using Tiles = TilesOf<kHeadDim>;
    const auto sizes_of = []<class Tile>(Tile) {
      return TileSizes{Tile::kM, Tile::kN, 1, Tile::kSharedBytes, Tile::kScoreWarpsN};
    };
    const bool listed = plan.variant.listed;
    const TileSizes wide = listed ? sizes_of(typename Tiles::WideListed()) : sizes_of(typename Tiles::Wide());
    const bool fills = !listed || divides<typename Tiles::WideListed>(p.block_q, p.block_k);
    plan.variant.wide =
        fills && plan.variant.aligned && wide.shared_bytes <= current_device().shared_bytes && !plan.variant.terms;
    plan.tile = plan.variant.wide ? wide : sizes_of(typename Tiles::Narrow());
  });
  static_cast<Geometry&>(plan.geometry) = geometry_of(p, plan.tile.rows, heads_in_tile(p));
}

// It returns what speaks against sm_90's mainloop, or nothing.
std::string plan_sm90(const BackwardParams& p, BackwardPlan& plan) {
  plan.head_dim = padded_head_dim<kTmaHeadDims>(p);
  with_head_dim<kTmaHeadDims>(p, [&]<int kHeadDim>() {
    using Tiles = TmaBackwardTiles<kHeadDim>;
    const auto sizes_of = []<class Tile>(Tile) {
      return TileSizes{Tile::kM, Tile::kN, Tile::kBlocksPerSm, Tile::kSharedBytes, Tile::kN / 16};
    };
    plan.tile =
        plan.variant.listed ? Tiles::Listed::choose(p.block_q, p.block_k, sizes_of) : sizes_of(typename Tiles::Dense());
  });
  const std::int64_t group = whole_heads_in_tile(p, plan.tile.rows);
  static_cast<Geometry&>(plan.geometry) = geometry_of(p, plan.tile.rows, group);
  if (!ATTNX_CUDA_SM90) return "attnx was built without it";
  if (plan.variant.terms) return kTermsReason;
  if (!has_sm90(p.score)) return kScoreReason;
  const TmaBackwardViews views = tma_views(p, group);
  if (const std::string why = why_not_tma(
          {{"query", views.query}, {"key", views.key}, {"value", views.value}, {"grad_output", views.grad_output}});
      !why.empty())
    return why;
  if (!are_aligned(p, {p.grad_query}, {p.grad_key}, {p.grad_value}))
    return "the rows of the gradients are not multiples of 16 bytes";
  return {};
}

// This counts the entries that the transposed lists span, unused ones included.
std::int64_t list_entries(const BackwardParams& p) {
  const BlockList& lists = p.query_blocks;
  const std::int64_t last = (p.batch - 1) * lists.indices_batch_stride + (p.heads_q - 1) * lists.indices_head_stride +
                            (ceil_div(p.length_k, p.block_k) - 1) * lists.indices_row_stride;
  return std::max<std::int64_t>(last + lists.width, 0);
}

}  // namespace

BackwardPlan make_plan(const BackwardParams& p, std::optional<Mainloop> asked, bool deterministic, void* workspace) {
  BackwardPlan plan;
  plan.variant.listed = p.key_blocks.counts;
  plan.variant.block_q = p.block_q;
  plan.variant.block_k = p.block_k;
  plan.variant.terms = has_terms(p);
  plan.variant.tables = p.terms.tables.index;
  plan.variant.aligned = are_aligned(p, {p.query, p.grad_query}, {p.key, p.grad_key}, {p.value, p.grad_value}) &&
                         is_aligned(p, p.grad_output, p.heads_q, p.value_dim);
  const auto on_sm80 = [&] {
    if (is_band_only(p.score)) return plan_sm80<kBandHeadDims, BackwardTiles>(p, plan);
    plan.variant.terms ? plan_sm80<kTermsHeadDims, TermsBackwardTiles>(p, plan)
                       : plan_sm80<kHeadDims, BackwardTiles>(p, plan);
  };
  plan_mainloop("backward", asked, plan, on_sm80, [&] { return plan_sm90(p, plan); });

  BackwardGeometry& g = plan.geometry;
  g.key_heads = Divisor(p.heads_k);
  g.row_heads = int(g.heads.divisor() / p.heads_k);
  g.key_blocks = Divisor(std::max<std::int64_t>(ceil_div(p.length_k, plan.tile.keys), 1));
  g.row_tiles = p.cu_seqlens_q ? p.packed_rows_q * g.group.divisor() / plan.tile.rows + p.batch * g.tiles_of_block
                               : p.batch * g.query_blocks.divisor();

  const std::int64_t tiles = g.heads.divisor() * g.row_tiles, rows = tiles * plan.tile.rows;
  BackwardScratch& scratch = plan.scratch;
  WorkspaceLayout layout;
  scratch.offset = layout.place<float>(workspace, rows);
  if (is_normalised(p.score)) scratch.delta = layout.place<float>(workspace, rows);
  if (p.score == Score::kSharpenedSoftplus) scratch.sharpened = layout.place<SharpenedRow>(workspace, rows);
  scratch.deterministic = deterministic;
  if (deterministic && plan.variant.listed) plan.list_order = layout.place<int>(workspace, list_entries(p));
  const bool adds_by_key = p.grad_key_bias.data || (p.grad_attn_mask.data && p.grad_attn_mask.row_stride == 0);
  const auto place_by_key = [&] { return layout.place<float>(workspace, p.batch * p.heads_q * p.length_k); };
  if (adds_by_key) plan.added_sums = place_by_key();
  if (p.grad_key_mask.data) plan.factor_sums = adds_by_key && is_normalised(p.score) ? plan.added_sums : place_by_key();
  if (has_gradient_of_distances(p)) {
    plan.bands = {p.length_q, p.length_k, grad_terms_rows(plan.head_dim), kGradTermsKeys};
    plan.distance_sums = layout.place<float>(workspace, p.batch * p.heads_q * plan.bands.count * plan.bands.sums());
  }
  const std::size_t zeros_begin = layout.bytes();
  plan.sums = scratch.grad_query_sum = layout.place<float>(workspace, rows * plan.head_dim);
  if (p.grad_bias) scratch.bias_sum = layout.place<float>(workspace, rows * plan.tile.score_warps);
  if (p.grad_alibi_slopes) scratch.slope_sum = layout.place<float>(workspace, rows * plan.tile.score_warps);
  scratch.turns = layout.place<int>(workspace, tiles);
  plan.workspace = layout.bytes();
  plan.sums_bytes = layout.bytes() - zeros_begin;
  return plan;
}

}  // namespace attnx::cuda
