#include "cuda/sm80/backward_passes.h"

#include "cuda/attention.h"
#include "cuda/launch/element.h"
#include "cuda/launch/launch.h"

namespace attnx::cuda {

namespace {

template <class Input>
const void* row_terms(Score score, bool aligned) {
  if (score == Score::kSigmoid)  // reads no input
    return reinterpret_cast<const void*>(attnx_row_terms<Score::kSigmoid, Input, true>);
  return aligned ? reinterpret_cast<const void*>(attnx_row_terms<Score::kSoftmax, Input, true>)
                 : reinterpret_cast<const void*>(attnx_row_terms<Score::kSoftmax, Input, false>);
}

}  // namespace

void launch_row_terms(const BackwardArguments& args, int rows_of_tile, bool aligned, cudaStream_t stream) {
  const auto& call = args.call;
  launch_kernel("attnx_row_terms",
                call.dtype == DType::kBFloat16 ? row_terms<__nv_bfloat16>(call.score, aligned)
                                               : row_terms<__half>(call.score, aligned),
                call.batch * args.heads.divisor() * args.query_blocks.divisor(), 256, 0, stream, args, rows_of_tile);
}

void launch_list_order(const BackwardArguments& args, cudaStream_t stream) {
  const std::int64_t key_blocks = (args.call.length_k + args.call.block_k - 1) / args.call.block_k;
  launch_kernel("attnx_list_order", reinterpret_cast<const void*>(attnx_list_order),
                args.call.batch * args.call.heads_q * key_blocks, 256, 0, stream, args, int(key_blocks));
}

void launch_parameter_sums(const BackwardArguments& args, int rows_of_tile, int score_warps, cudaStream_t stream) {
  if (args.bias_sum || args.slope_sum)
    launch_kernel("attnx_parameter_sums", reinterpret_cast<const void*>(attnx_parameter_sums),
                  args.call.batch * args.call.heads_q, 256, 0, stream, args, rows_of_tile, score_warps);
}

void sum_over_batch(const double* from, float* to, std::int64_t batch, std::int64_t heads, const Launch& launch) {
  launch_kernel("attnx_sum_over_batch", reinterpret_cast<const void*>(attnx_sum_over_batch), (heads + 255) / 256, 256,
                0, static_cast<cudaStream_t>(launch.stream), from, to, batch, heads);
}

}  // namespace attnx::cuda
