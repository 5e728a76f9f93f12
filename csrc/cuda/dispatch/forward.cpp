#include <algorithm>
#include <stdexcept>

#include "attnx/policies.h"
#include "cuda/attention.h"
#include "cuda/dispatch/plan.h"
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/head_dims.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/mainloop/sm90/tile_sizes.h"
#include "cuda/passes/combine.h"
#include "cuda/routing/attention.h"
#include "cuda/staircase/attention.h"

namespace attnx::cuda {

namespace {

// This returns as many of the heads, a divisor of their number, as keep their keys and values within most of an L2 of
// 50 MB.
std::int64_t heads_in_section(const ForwardParams& p, std::int64_t heads, std::int64_t heads_on_key_head) {
  constexpr std::int64_t kBytes = 32 << 20;
  const std::int64_t bytes = std::max<std::int64_t>(p.length_k * (p.head_dim + p.value_dim) * 2, 1);
  std::int64_t most = std::clamp<std::int64_t>(kBytes / bytes * heads_on_key_head, 1, heads);
  while (heads % most) --most;
  return most;
}

// This schedules blocks that stay and take tiles from a counter.
void schedule_sm90(const ForwardPlan& plan, ForwardCall& call) {
  if (call.blocks > INT32_MAX)
    throw std::runtime_error("query: expected at most 2^31 - 1 tiles of rows, got " + std::to_string(call.blocks));
  const auto& p = call.params;
  const Geometry& g = plan.geometry;
  const std::int64_t heads = p.batch * g.heads.divisor(), heads_on_key_head = g.heads.divisor() / p.heads_k;
  call.schedule = {int(call.blocks), Divisor(heads_in_section(p, heads, heads_on_key_head)), plan.taken};
  check(cudaMemsetAsync(plan.taken, 0, sizeof *plan.taken, call.stream), "cudaMemsetAsync");
  const std::int64_t resident = std::int64_t(current_device().sm_count) * plan.tile.blocks_per_sm;
  call.blocks = std::min(call.blocks, resident);
}

// Where logits have terms, one kernel serves softmax with a sink and without, because they have kernels enough.
constexpr Score or_sink(Score score) { return score == Score::kSoftmax ? Score::kSoftmaxSink : score; }

template <Score kScore, DType kDType>
void launch_sm80(const ForwardPlan& plan, const ForwardCall& call) {
  const auto& p = call.params;
  if constexpr (is_band_only(kScore)) {
    with_head_dim<kBandHeadDims>(p, [&]<int kHeadDim>() { launch_forward_sm80<kScore, kDType, kHeadDim>(call); });
  } else if (plan.variant.terms) {
    constexpr Score kOrSink = or_sink(kScore);
    with_head_dim<kTermsHeadDims>(p, [&]<int kHeadDim>() {
      if constexpr (kOrSink == Score::kSoftmaxSink)
        if (plan.variant.tables) return launch_tables_forward_sm80<kOrSink, kDType, kHeadDim>(call);
      launch_terms_forward_sm80<kOrSink, kDType, kHeadDim>(call);
    });
  } else {
    with_head_dim<kHeadDims>(p, [&]<int kHeadDim>() { launch_forward_sm80<kScore, kDType, kHeadDim>(call); });
  }
}

template <Score kScore, DType kDType>
void launch_sm90(const ForwardPlan& plan, const ForwardCall& call) {
  const auto& p = call.params;
  if (plan.variant.terms) {
    if constexpr (!is_band_only(kScore))
      with_head_dim<kTermsTmaHeadDims>(
          p, [&]<int kHeadDim>() { launch_terms_forward_sm90<or_sink(kScore), kDType, kHeadDim>(call); });
  } else if constexpr (has_sm90(kScore)) {
    with_head_dim<kTmaHeadDims>(p, [&]<int kHeadDim>() { launch_forward_sm90<kScore, kDType, kHeadDim>(call); });
  }
}

void launch(const ForwardPlan& plan, const ForwardCall& call) {
  with_score(call.params.score, [&]<Score kScore>() {
    with_dtype(call.params.dtype, [&]<DType kDType>() {
      if (plan.mainloop == Mainloop::kSm80) {
        launch_sm80<kScore, kDType>(plan, call);
      } else if constexpr (ATTNX_CUDA_SM90) {
        launch_sm90<kScore, kDType>(plan, call);
      }
    });
  });
}

}  // namespace

std::size_t forward_workspace(const ForwardParams& params, const Launch& launch) {
  if (params.cache) return staircase_attention_workspace(params, launch);
  if (params.gather) return routed_forward_workspace(params, launch);
  return make_plan(params, launch.mainloop, nullptr).workspace;
}

void forward(const ForwardParams& p, const Launch& where) {
  if (p.cache) return staircase_attention(p, where);
  if (p.gather) return routed_forward(p, where);
  const Range range(p.score, "");
  const ForwardPlan plan = make_plan(p, where.mainloop, where.workspace);
  const auto stream = static_cast<cudaStream_t>(where.stream);
  const int splits = plan.geometry.splits.divisor();
  ForwardCall call{p, plan.geometry, scaling_of(p), plan.partial, {}, plan.variant, plan.tiles * splits, stream};
  if (plan.mainloop == Mainloop::kSm90 && call.blocks > 0) schedule_sm90(plan, call);
  launch(plan, call);
  if (splits > 1)
    launch_combine(CombineArguments{plan.geometry, p.output, p.logsumexp, plan.partial,
                                    plan.geometry.query_blocks.divisor() * plan.tile.rows, plan.head_dim},
                   is_normalised(p.score), p.dtype, stream);
}

}  // namespace attnx::cuda
