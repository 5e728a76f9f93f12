#include "cuda/attention.h"
#include "cuda/dispatch/plan.h"
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/sums.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/head_dims.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/mainloop/sm90/backward_tile_sizes.h"
#include "cuda/passes/list_order.h"
#include "cuda/passes/parameter_sums.h"
#include "cuda/passes/sink_sums.h"
#include "cuda/routing/attention.h"

namespace attnx::cuda {

namespace {

// One list may serve all heads, or all sequences; then its order is counted once.
void order_lists(const BackwardParams& p, int* order, cudaStream_t stream) {
  const auto own = [](std::int64_t count, std::int64_t stride) { return stride == 0 ? 1 : int(count); };
  launch_list_order({p.key_blocks, p.query_blocks, own(p.batch, p.query_blocks.indices_batch_stride),
                     own(p.heads_q, p.query_blocks.indices_head_stride), int(ceil_div(p.length_k, p.block_k)), order},
                    stream);
}

void launch(const BackwardPlan& plan, const BackwardCall& call) {
  const auto& p = call.params;
  const GradQueryArguments grad_query{plan.geometry, call.scaling.scale, plan.scratch.grad_query_sum, p.grad_query,
                                      p.grad_query_addend};
  with_backward_score(p.score, [&]<Score kScore>() {
    with_dtype(p.dtype, [&]<DType kDType>() {
      const auto on_sm80 = [&]<const auto & kTable>(const auto& launch) {
        with_head_dim<kTable>(p, [&]<int kHeadDim>() {
          launch.template operator()<kHeadDim>();
          launch_grad_query_sm80<kDType, kHeadDim>(grad_query, call.variant, call.stream);
        });
      };
      const auto plain = [&]<int kHeadDim>() { launch_backward_sm80<kScore, kDType, kHeadDim>(call); };
      if (plan.mainloop == Mainloop::kSm90) {
        if constexpr (ATTNX_CUDA_SM90 && has_sm90(kScore))
          with_head_dim<kTmaHeadDims>(p, [&]<int kHeadDim>() {
            launch_backward_sm90<kScore, kDType, kHeadDim>(call);
            launch_grad_query_sm90<kDType, kHeadDim>(grad_query, call.variant, call.stream);
          });
      } else if constexpr (is_band_only(kScore)) {
        on_sm80.template operator()<kBandHeadDims>(plain);
      } else if (plan.variant.terms) {
        on_sm80.template operator()<kTermsHeadDims>([&]<int kHeadDim>() {
          if constexpr (kScore == Score::kSoftmax)
            if (plan.variant.tables) return launch_tables_backward_sm80<kScore, kDType, kHeadDim>(call);
          launch_terms_backward_sm80<kScore, kDType, kHeadDim>(call);
        });
      } else {
        on_sm80.template operator()<kHeadDims>(plain);
      }
    });
  });
}

}  // namespace

std::size_t backward_workspace(const BackwardParams& params, const Launch& launch) {
  if (params.gather) return routed_backward_workspace(params, launch);
  return make_plan(params, launch.mainloop, launch.deterministic, nullptr).workspace;
}

void backward(const BackwardParams& p, const Launch& where) {
  if (p.gather) return routed_backward(p, where);
  const Range range(p.score, "_backward");
  const BackwardPlan plan = make_plan(p, where.mainloop, where.deterministic, where.workspace);
  const auto stream = static_cast<cudaStream_t>(where.stream);
  check(cudaMemsetAsync(plan.sums, 0, plan.sums_bytes, stream), "cudaMemsetAsync");

  BackwardCall call{p,
                    plan.geometry,
                    scaling_of(p),
                    plan.scratch,
                    plan.list_order,
                    plan.tile.rows,
                    plan.variant,
                    p.batch * p.heads_k * plan.geometry.key_blocks.divisor(),
                    stream};
  BackwardCall row_terms = call;  // it reads the output as well
  row_terms.variant.aligned = call.variant.aligned && is_aligned(p, p.output, p.heads_q, p.value_dim);
  with_backward_score(p.score, [&]<Score kScore>() { launch_row_terms<kScore>(row_terms); });
  launch_sharpened_sums(p, plan, stream);
  if (plan.list_order) order_lists(p, plan.list_order, stream);
  launch(plan, call);
  launch_grad_sums(p, plan, stream);
  launch_parameter_sums({plan.geometry, plan.scratch.bias_sum, plan.scratch.slope_sum, plan.tile.rows,
                         plan.tile.score_warps, p.grad_bias, p.grad_alibi_slopes},
                        stream);
  if (p.grad_sink)
    launch_sink_sums({plan.geometry, p.sink, p.logsumexp, plan.scratch.delta, plan.tile.rows, p.grad_sink}, stream);
}

}  // namespace attnx::cuda
