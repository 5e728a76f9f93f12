#include "sums.h"

#include "attnx/policies.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/head_dims.h"
#include "cuda/units/sums_call.h"

namespace attnx::cuda {

namespace {

// This calls launch.template operator()<score, dtype, head_dim>() for the unit of a call.
template <class Launch>
void with_unit(const AttentionParams& p, const Launch& launch) {
  with_backward_score(p.score, [&]<Score kScore>() {
    with_dtype(p.dtype, [&]<DType kDType>() {
      with_head_dim<kSumsHeadDims>(p, [&]<int kHeadDim>() { launch.template operator()<kScore, kDType, kHeadDim>(); });
    });
  });
}

}  // namespace

void launch_grad_sums(const BackwardParams& p, const BackwardPlan& plan, cudaStream_t stream) {
  if (!p.grad_block_bias) return;
  const GradSumsCall call{{geometry_of(p, plan.tile.rows, 1),
                           scaling_of(p),
                           {plan.geometry, plan.tile.rows, plan.scratch.offset, plan.scratch.delta},
                           plan.variant.aligned,
                           stream},
                          p};
  with_unit(p,
            [&]<Score kScore, DType kDType, int kHeadDim>() { launch_grad_sums_sm80<kScore, kDType, kHeadDim>(call); });
}

}  // namespace attnx::cuda
