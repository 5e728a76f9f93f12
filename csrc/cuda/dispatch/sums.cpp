#include "sums.h"

#include "cuda/attention.h"
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/head_dims.h"
#include "cuda/passes/distance_sums.h"
#include "cuda/passes/term_sums.h"
#include "cuda/units/sums_call.h"

namespace attnx::cuda {

namespace {

// This calls launch.template operator()<score, dtype, head_dim>() for the unit of a call.
template <const auto& kHeadDims, class Launch>
void with_unit(const AttentionParams& p, const Launch& launch) {
  with_backward_score(p.score, [&]<Score kScore>() {
    if constexpr (!is_band_only(kScore)) {
      with_dtype(p.dtype, [&]<DType kDType>() {
        with_head_dim<kHeadDims>(p, [&]<int kHeadDim>() { launch.template operator()<kScore, kDType, kHeadDim>(); });
      });
    }
  });
}

template <const auto& kHeadDims = kSumsHeadDims>
void launch(SumsCall call, const WeightsParams& p, const Launch& where) {
  call.geometry = geometry_of(p, 1, 1);
  call.scaling = scaling_of(p);
  call.aligned = are_aligned(p, {p.query}, {p.key}, {});
  call.stream = static_cast<cudaStream_t>(where.stream);
  with_unit<kHeadDims>(
      p, [&]<Score kScore, DType kDType, int kHeadDim>() { launch_sums_sm80<kScore, kDType, kHeadDim>(call); });
}

}  // namespace

std::size_t key_weights_workspace(const KeyWeightsParams&, const Launch&) { return 0; }
std::size_t row_weights_workspace(const RowWeightsParams&, const Launch&) { return 0; }
std::size_t max_logits_workspace(const MaxLogitsParams&, const Launch&) { return 0; }
std::size_t chosen_keys_workspace(const ChosenKeysParams&, const Launch&) { return 0; }

void key_weights(const KeyWeightsParams& p, const Launch& where) {
  const Range range("attnx::attention_key_weights");
  launch({.key_weights = &p}, p, where);
}

void row_weights(const RowWeightsParams& p, const Launch& where) {
  const Range range("attnx::attention_row_weights");
  launch({.row_weights = &p}, p, where);
}

void max_logits(const MaxLogitsParams& p, const Launch& where) {
  const Range range("attnx::attention_max_logits");
  launch({.max_logits = &p}, p, where);
}

void chosen_keys(const ChosenKeysParams& p, const Launch& where) {
  const Range range("attnx::pointer_sample");
  launch<kChosenKeysHeadDims>({.chosen_keys = &p}, p, where);
}

std::size_t softplus_rows_workspace(const SoftplusRowsParams&, const Launch&) { return 0; }

static void launch_softplus_rows(const AttentionParams& p, const SoftplusRowsCall& call) {
  with_dtype(p.dtype, [&]<DType kDType>() {
    with_head_dim<kBandHeadDims>(
        p, [&]<int kHeadDim>() { launch_softplus_rows_sm80<Score::kSharpenedSoftplus, kDType, kHeadDim>(call); });
  });
}

void softplus_rows(const SoftplusRowsParams& p, const Launch& where) {
  const Range range("attnx::sharpened_softplus_attention rows");
  launch_softplus_rows(p, {.forward = &p,
                           .geometry = geometry_of(p, 1, 1),
                           .scaling = scaling_of(p),
                           .stream = static_cast<cudaStream_t>(where.stream)});
}

void launch_sharpened_sums(const BackwardParams& p, const BackwardPlan& plan, cudaStream_t stream) {
  if (!plan.scratch.sharpened) return;
  const RowsOfBackward rows{plan.geometry, plan.tile.rows, plan.scratch.offset, plan.scratch.delta};
  launch_softplus_rows(p, {.backward = &p,
                           .geometry = geometry_of(p, 1, 1),
                           .scaling = scaling_of(p),
                           .rows = {rows, plan.scratch.sharpened},
                           .stream = stream});
}

void launch_grad_sums(const BackwardParams& p, const BackwardPlan& plan, cudaStream_t stream) {
  if (!p.grad_block_bias && !p.grad_attn_mask.data && !plan.added_sums && !plan.factor_sums &&
      !p.grad_query_table.data && !p.grad_key_table.data)
    return;
  const GradSumsCall call{p,
                          geometry_of(p, 1, 1),
                          scaling_of(p),
                          {plan.geometry, plan.tile.rows, plan.scratch.offset, plan.scratch.delta},
                          plan.added_sums,
                          plan.factor_sums,
                          plan.distance_sums,
                          stream};
  with_unit<kSumsHeadDims>(
      p, [&]<Score kScore, DType kDType, int kHeadDim>() { launch_grad_sums_sm80<kScore, kDType, kHeadDim>(call); });

  const auto add_up = [&](const float* sums, const PerKey& factors, void* to, std::int64_t batch_stride,
                          std::int64_t head_stride, std::int64_t key_stride) {
    if (to)
      launch_term_sums({call.geometry, sums, factors, static_cast<float*>(to), batch_stride, head_stride, key_stride},
                       p.packed_rows_k, stream);
  };
  const PerKey &bias = p.grad_key_bias, &factor = p.grad_key_mask;
  const PairMask& mask = p.grad_attn_mask;
  add_up(plan.added_sums, p.terms.key_mask, bias.data, bias.batch_stride, bias.head_stride, 1);
  add_up(plan.factor_sums, {}, factor.data, factor.batch_stride, factor.head_stride, 1);
  if (plan.distance_sums)
    launch_distance_sums(
        {plan.distance_sums, plan.bands, int(p.batch), int(p.heads_q), int(p.length_q), int(p.length_k), mask}, stream);
  else if (!has_gradient_of_pairs(p))
    add_up(plan.added_sums, p.terms.key_mask, const_cast<void*>(mask.data), mask.batch_stride, mask.head_stride,
           mask.key_stride);
}

}  // namespace attnx::cuda
