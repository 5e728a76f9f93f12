#include "cuda/staircase/loop.h"

#include "attnx/policies.h"
#include "cuda/dispatch/splits.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/dispatch/workspace.h"
#include "cuda/head_dims.h"
#include "cuda/mainloop/sm80/staircase_tile_sizes.h"
#include "cuda/passes/combine.h"

namespace attnx::cuda {

namespace {

void plan_sm80(const ForwardParams& p, ForwardPlan& plan) {
  with_head_dim<kStaircaseHeadDims>(p, [&]<int kHeadDim>() {
    using Tile = typename StaircaseForwardTiles<kHeadDim>::Tile;
    plan.tile = {Tile::kM, Tile::kN, Tile::kBlocksPerSm, Tile::kSharedBytes, 0};
  });
  static_cast<Geometry&>(plan.geometry) = geometry_of(p, plan.tile.rows, heads_in_tile(p));
}

}  // namespace

ForwardPlan plan_staircase_loop(const ForwardParams& p, std::optional<Mainloop> asked, void* workspace) {
  ForwardPlan plan;
  plan.head_dim = padded_head_dim<kStaircaseHeadDims>(p);
  plan.variant.aligned = are_aligned(p, {p.query, p.output}, {}, {});
  plan_mainloop(
      "call", asked, plan, [&] { plan_sm80(p, plan); }, [] { return "it has no loop over a staircase cache"; });
  ForwardGeometry& g = plan.geometry;
  plan.tiles = p.batch * g.heads.divisor() * g.query_blocks.divisor();
  const int splits = choose_splits(plan.tiles, ceil_div(p.cache->layout.max_length, plan.tile.keys),
                                   current_device().sm_count * plan.tile.blocks_per_sm);
  g.splits = Divisor(splits);
  WorkspaceLayout layout;
  if (splits > 1) {
    const std::int64_t rows = splits * plan.tiles * plan.tile.rows;
    plan.partial.output = layout.place<float>(workspace, rows * plan.head_dim);
    if (is_normalised(p.score)) plan.partial.logsumexp = layout.place<float>(workspace, rows);
  }
  plan.workspace = layout.bytes();
  return plan;
}

void run_staircase_loop(const ForwardParams& p, const ForwardPlan& plan, cudaStream_t stream) {
  const int splits = plan.geometry.splits.divisor();
  const StaircaseForwardCall call{p,  plan.geometry, scaling_of(p),       plan.partial,
                                  {}, plan.variant,  plan.tiles * splits, stream};
  with_dtype(p.dtype, [&]<DType kDType>() {
    with_head_dim<kStaircaseHeadDims>(p, [&]<int kHeadDim>() {
      p.score == Score::kSigmoid ? launch_staircase_forward_sm80<Score::kSigmoid, kDType, kHeadDim>(call)
                                 : launch_staircase_forward_sm80<Score::kSoftmax, kDType, kHeadDim>(call);
    });
  });
  if (splits > 1)
    launch_combine(StaircaseCombineArguments{{plan.geometry, p.output, p.logsumexp, plan.partial,
                                              plan.geometry.query_blocks.divisor() * plan.tile.rows, plan.head_dim},
                                             p.query_lengths},
                   is_normalised(p.score), p.dtype, stream);
}

}  // namespace attnx::cuda
