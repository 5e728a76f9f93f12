#include "tma_views.h"

namespace attnx::cuda {

namespace {

TmaTensor of_queries(const AttentionParams& p, const Tensor& x, std::int64_t features, std::int64_t group) {
  return p.cu_seqlens_q ? TmaTensor{p.dtype, x, features, group, p.packed_rows_q, p.heads_q, 1}
                        : TmaTensor{p.dtype, x, features, group, p.length_q, p.heads_q, p.batch};
}

TmaTensor of_keys(const AttentionParams& p, const Tensor& x, std::int64_t features) {
  return p.cu_seqlens_q ? TmaTensor{p.dtype, x, features, 1, p.packed_rows_k, p.heads_k, 1}
                        : TmaTensor{p.dtype, x, features, 1, p.length_k, p.heads_k, p.batch};
}

}  // namespace

TmaForwardViews tma_views(const ForwardParams& p, std::int64_t group) {
  return {of_queries(p, p.query, p.head_dim, group), of_keys(p, p.key, p.head_dim), of_keys(p, p.value, p.value_dim),
          of_queries(p, p.output, p.value_dim, group)};
}

TmaBackwardViews tma_views(const BackwardParams& p, std::int64_t group) {
  return {of_queries(p, p.query, p.head_dim, group), of_keys(p, p.key, p.head_dim), of_keys(p, p.value, p.value_dim),
          of_queries(p, p.grad_output, p.value_dim, group)};
}

}  // namespace attnx::cuda
