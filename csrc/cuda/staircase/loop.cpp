#include "cuda/staircase/loop.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attnx/policies.h"
#include "cuda/dispatch/splits.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/dispatch/workspace.h"
#include "cuda/head_dims.h"
#include "cuda/mainloop/sm80/staircase_tile_sizes.h"
#include "cuda/mainloop/sm90/staircase_tile_sizes.h"
#include "cuda/passes/combine.h"

namespace attnx::cuda {

namespace {

template <template <int> class Tiles, const auto& kHeadDims>
void plan_tiles(const ForwardParams& p, ForwardPlan& plan) {
  with_head_dim<kHeadDims>(p, [&]<int kHeadDim>() {
    using Tile = typename Tiles<kHeadDim>::Tile;
    plan.tile = {Tile::kM, Tile::kN, Tile::kBlocksPerSm, Tile::kSharedBytes, 0};
  });
  static_cast<Geometry&>(plan.geometry) = geometry_of(p, plan.tile.rows, heads_in_tile(p));
}

// It returns what speaks against sm_90's mainloop, or nothing. Where none is asked for, sm_80's serves: by the counts
// in docs/notes/staircase.md one warpgroup that unpacks for two keeps them waiting.
std::string plan_sm90(const ForwardParams& p, std::optional<Mainloop> asked, ForwardPlan& plan) {
  if (plan.head_dim > std::ranges::max(kStaircaseTmaHeadDims))
    return "its warps have no registers for " + std::to_string(plan.head_dim) + " features beside those that unpack";
  plan_tiles<StaircaseTmaForwardTiles, kStaircaseTmaHeadDims>(p, plan);
  if (!ATTNX_CUDA_SM90) return "attnx was built without it";
  return asked ? "" : "its producers unpack codes more slowly than all warps of sm_80's loop do";
}

// Blocks stay and take tiles from a counter. The codes of all heads stay in the L2 cache together, or those of none do.
ForwardSchedule schedule(const ForwardPlan& plan, std::int64_t row_tiles, cudaStream_t stream) {
  if (row_tiles > INT32_MAX)
    throw std::runtime_error("query: expected at most 2^31 - 1 tiles of rows, got " + std::to_string(row_tiles));
  check(cudaMemsetAsync(plan.taken, 0, sizeof *plan.taken, stream), "cudaMemsetAsync");
  return {int(row_tiles), Divisor(plan.geometry.batch * plan.geometry.heads.divisor()), plan.taken};
}

}  // namespace

ForwardPlan plan_staircase_loop(const ForwardParams& p, std::optional<Mainloop> asked, void* workspace) {
  ForwardPlan plan;
  plan.head_dim = padded_head_dim<kStaircaseHeadDims>(p);
  plan.variant.aligned = are_aligned(p, {p.query, p.output}, {}, {});
  plan_mainloop(
      "call", asked, plan, [&] { plan_tiles<StaircaseForwardTiles, kStaircaseHeadDims>(p, plan); },
      [&] { return plan_sm90(p, asked, plan); });
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
  if (plan.mainloop == Mainloop::kSm90) plan.taken = layout.place<int>(workspace, 1);
  plan.workspace = layout.bytes();
  return plan;
}

void run_staircase_loop(const ForwardParams& p, const ForwardPlan& plan, cudaStream_t stream) {
  const int splits = plan.geometry.splits.divisor();
  StaircaseForwardCall call{p,  plan.geometry, scaling_of(p),       plan.partial,
                            {}, plan.variant,  plan.tiles * splits, stream};
  if (plan.mainloop == Mainloop::kSm90 && call.blocks > 0) {
    call.schedule = schedule(plan, call.blocks, stream);
    call.blocks = std::min<std::int64_t>(call.blocks, current_device().sm_count * plan.tile.blocks_per_sm);
  }
  with_dtype(p.dtype, [&]<DType kDType>() {
    with_head_dim<kStaircaseHeadDims>(p, [&]<int kHeadDim>() {
      const auto launch = [&]<Score kScore>() {
        if (plan.mainloop == Mainloop::kSm80) {
          launch_staircase_forward_sm80<kScore, kDType, kHeadDim>(call);
        } else if constexpr (ATTNX_CUDA_SM90 && kHeadDim <= std::ranges::max(kStaircaseTmaHeadDims)) {
          launch_staircase_forward_sm90<kScore, kDType, kHeadDim>(call);
        }
      };
      p.score == Score::kSigmoid ? launch.template operator()<Score::kSigmoid>()
                                 : launch.template operator()<Score::kSoftmax>();
    });
  });
  if (splits > 1)
    launch_combine(StaircaseCombineArguments{{plan.geometry, p.output, p.logsumexp, plan.partial,
                                              plan.geometry.query_blocks.divisor() * plan.tile.rows, plan.head_dim},
                                             p.query_lengths},
                   is_normalised(p.score), p.dtype, stream);
}

}  // namespace attnx::cuda
