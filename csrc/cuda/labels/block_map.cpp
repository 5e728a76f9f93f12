#include "block_map.h"

#include <algorithm>

#include "cuda/dispatch/range.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/dispatch/workspace.h"
#include "cuda/routing/scores.h"
#include "label_blocks.h"
#include "pooled_blocks.h"

namespace attnx::cuda {

namespace {

// A key head and the query heads that share it make one product of matrices, [query blocks of all, key blocks].
struct MapPlan {
  PooledBlocks query, key;
  std::int64_t features, group;
  std::int64_t problems, at_once;  // products of some of them are made, and consumed while they are in the L2 cache
  std::int64_t row_stride;         // of products
  float* products;
  std::size_t workspace;
};

MapPlan make_plan(const BlockMapParams& p, void* memory) {
  constexpr std::int64_t kProducts = 6 << 20;  // float32: half of an L2 cache of 50 MB
  constexpr std::int64_t kProblems = 65535;    // the most that one launch has
  MapPlan plan;
  WorkspaceLayout layout;
  plan.features = padded_to_vectors(p.head_dim);
  plan.group = p.heads_q / p.heads_k;
  const auto pooled = [&](const Tensor& rows, const std::int32_t* starts, const std::int32_t* ends, std::int64_t heads,
                          std::int64_t length, std::int64_t block, float sign) {
    const std::int64_t blocks = ceil_div(length, block);
    return PooledBlocks{rows,   starts, ends,
                        heads,  length, block,
                        blocks, sign,   layout.place<float>(memory, p.batch * heads * blocks * plan.features)};
  };
  const auto sign = float(int(p.scale > 0) - int(p.scale < 0));
  plan.query = pooled(p.query, p.cu_seqlens_q, p.cu_seqlens_q ? p.cu_seqlens_q + 1 : nullptr, p.heads_q, p.length_q,
                      p.block_q, sign);
  plan.key = pooled(p.key, p.key_starts, p.key_ends, p.heads_k, p.length_k, p.block_k, 1);
  plan.row_stride = padded_to_vectors(plan.key.blocks);
  const std::int64_t of_problem = plan.group * plan.query.blocks * plan.row_stride;
  plan.problems = p.batch * p.heads_k;
  plan.at_once = std::clamp(kProducts / of_problem, std::int64_t(1), std::min(plan.problems, kProblems));
  plan.products = layout.place<float>(memory, plan.at_once * of_problem);
  plan.workspace = layout.bytes();
  return plan;
}

void pool(const BlockMapParams& p, const MapPlan& plan, const Launch& launch) {
  pool_blocks(p, plan.query, plan.key, launch);
  if (p.smooth_k) smooth_blocks(p, plan.key, launch);
}

void multiply(const MapPlan& plan, std::int64_t first, std::int64_t problems, float* products, const Launch& launch) {
  const std::int64_t rows = plan.group * plan.query.blocks;
  const std::int64_t of_queries = rows * plan.features, of_keys = plan.key.blocks * plan.features;
  routing_scores({.problems = problems,
                  .rows = plan.key.blocks,
                  .centroids = rows,
                  .features = plan.features,
                  .row_matrix = {plan.key.means + first * of_keys, of_keys, plan.features},
                  .centroid_matrix = {plan.query.means + first * of_queries, of_queries, plan.features},
                  .score_matrix = {products, rows * plan.row_stride, plan.row_stride}},
                 launch);
}

void label(const BlockMapParams& p, const MapPlan& plan, std::int64_t first, std::int64_t problems,
           const Launch& launch) {
  launch_label_blocks({.grid = {p.length_q, p.length_k, p.block_q, p.block_k, p.window_right == 0},
                       .lengths = {p.cu_seqlens_q, p.key_starts, p.key_ends},
                       .first_head = first * plan.group,
                       .heads = problems * plan.group,
                       .heads_of_sequence = p.heads_q,
                       .products = plan.products,
                       .row_stride = plan.row_stride,
                       .shares = p.shares,
                       .labels = p.labels + first * plan.group * plan.query.blocks * plan.key.blocks},
                      launch);
}

}  // namespace

std::size_t block_map_workspace(const BlockMapParams& p, const Launch&) { return make_plan(p, nullptr).workspace; }

void block_map(const BlockMapParams& p, const Launch& launch) {
  const Range range("attnx::sparse_linear_block_map");
  const MapPlan plan = make_plan(p, launch.workspace);
  pool(p, plan, launch);
  for (std::int64_t first = 0; first < plan.problems; first += plan.at_once) {
    const std::int64_t problems = std::min(plan.at_once, plan.problems - first);
    multiply(plan, first, problems, plan.products, launch);
    label(p, plan, first, problems, launch);
  }
}

void block_products(const BlockMapParams& p, float* products, const Launch& launch) {
  const MapPlan plan = make_plan(p, launch.workspace);
  pool(p, plan, launch);
  multiply(plan, 0, plan.problems, products, launch);
}

}  // namespace attnx::cuda
