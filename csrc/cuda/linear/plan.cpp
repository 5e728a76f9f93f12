#include "cuda/linear/plan.h"

#include "cuda/dispatch/tiling.h"
#include "cuda/dispatch/workspace.h"

namespace attnx::cuda {

namespace {

constexpr std::int64_t kSectionBytes = 32 << 20;  // of states and sums, which stay in the L2 cache

std::int64_t whole_vectors(std::int64_t n) { return ceil_div(n, 8) * 8; }

}  // namespace

LinearPlan plan_linear(const LinearParams& p, bool aligned, bool backward, void* workspace) {
  LinearPlan plan{};
  LinearArguments& a = plan.arguments;
  static_cast<Geometry&>(a) = geometry_of(p, kLinearRows, 1);
  a.feature_map = p.feature_map;
  a.aligned = aligned;
  a.heads_of_unit = int(p.heads_q / p.heads_k);
  a.block_q = int(p.block_q);
  a.block_k = int(p.block_k);
  a.query_blocks_of_head = int(ceil_div(p.length_q, p.block_q));
  a.key_blocks_of_head = int(ceil_div(p.length_k, p.block_k));
  a.state.features = int(p.head_dim);
  a.state.value_lanes = int(whole_vectors(p.value_dim));
  a.state.last = p.head_dim * a.state.value_lanes;
  a.state.size = a.state.last + whole_vectors(p.head_dim);
  a.labels = p.labels;
  a.labels_batch_stride = p.labels_batch_stride;
  a.labels_head_stride = p.labels_head_stride;
  a.labels_row_stride = p.labels_row_stride;
  a.scope_low = p.scope_low;
  a.scope_high = p.scope_high;
  a.scope_stride = whole_vectors(a.key_blocks_of_head);

  plan.units = p.batch * p.heads_k;
  const std::int64_t query_blocks = std::int64_t(a.heads_of_unit) * a.query_blocks_of_head;
  const std::int64_t states_of_unit = a.key_blocks_of_head + query_blocks;
  const std::int64_t fitting = kSectionBytes / std::max<std::int64_t>(states_of_unit * a.state.size * 2, 1);
  plan.units_of_section = std::clamp<std::int64_t>(fitting, 1, std::clamp<std::int64_t>(plan.units, 1, 65535));

  WorkspaceLayout layout;
  const auto place = [&]<class T>(T*& to, std::int64_t n) { to = layout.place<T>(workspace, n); };
  const auto place_matrix = [&](void*& to, std::int64_t n) { to = layout.place<std::uint16_t>(workspace, n); };
  place_matrix(a.scope, plan.units * query_blocks * a.scope_stride);
  place(a.scope_scales, plan.units * query_blocks);
  place_matrix(a.by_key, plan.units_of_section * a.key_blocks_of_head * a.state.size);
  place_matrix(a.by_query, plan.units_of_section * query_blocks * a.state.size);
  if (backward) place(a.rows, plan.units_of_section * a.heads_of_unit * p.length_q);
  plan.workspace = layout.bytes();
  return plan;
}

}  // namespace attnx::cuda
