#include "cuda/attention.h"
#include "cuda/dispatch/plan.h"
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/head_dims.h"
#include "cuda/mainloop/sm80/jvp_tile_sizes.h"
#include "cuda/units/call.h"

namespace attnx::cuda {

namespace {

// It tells whether every row that is copied or stored starts on 16 bytes. A null tangent is neither.
bool all_aligned(const JvpParams& p) {
  return are_aligned(p, {p.query, p.tangent_query}, {p.key, p.tangent_key}, {p.value, p.tangent_value}) &&
         is_aligned(p, p.output, p.heads_q, p.value_dim) && is_aligned(p, p.tangent_output, p.heads_q, p.value_dim);
}

template <Score kScore>
void launch(const JvpParams& p, cudaStream_t stream) {
  with_dtype(p.dtype, [&]<DType kDType>() {
    with_head_dim<kJvpHeadDims>(p, [&]<int kHeadDim>() {
      ForwardGeometry geometry{geometry_of(p, kJvpRows, heads_in_tile(p)), Divisor(1)};
      const std::int64_t blocks = p.batch * geometry.heads.divisor() * geometry.query_blocks.divisor();
      launch_jvp_forward_sm80<kScore, kDType, kHeadDim>({p, geometry, scaling_of(p), all_aligned(p), blocks, stream});
    });
  });
}

}  // namespace

std::size_t jvp_workspace(const JvpParams&, const Launch&) { return 0; }

void jvp(const JvpParams& p, const Launch& where) {
  const Range range(p.score, "_jvp");
  Plan plan;
  plan_mainloop("call", where.mainloop, plan, [] {}, [] { return std::string("it has no kernels with tangents"); });
  const auto stream = static_cast<cudaStream_t>(where.stream);
  p.score == Score::kSoftmax ? launch<Score::kSoftmax>(p, stream) : launch<Score::kSigmoid>(p, stream);
}

}  // namespace attnx::cuda
