#include "parameter_sums.h"

#include "cuda/common/device.h"
#include "cuda/common/reduce.h"
#include "cuda/common/sequence.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256;

}  // namespace

// A block sums over the rows of a sequence and head.
__global__ void __launch_bounds__(kThreads) attnx_parameter_sums(const __grid_constant__ ParameterSumsArguments args) {
  const int query_head = blockIdx.x % int(args.heads_q), batch = blockIdx.x / int(args.heads_q);
  const Sequence sequence = sequence_of(args, batch);
  const int head = query_head / args.group.divisor(), place_in_group = query_head % args.group.divisor();
  const auto sum_of = [&](const float* sums) {
    double sum = 0;
    for (int query = threadIdx.x; query < sequence.length_q; query += blockDim.x) {
      const int row = query * args.group.divisor() + place_in_group;
      const std::int64_t row_tile =
          head * args.row_tiles + row_tile_of(args, batch, sequence, row / args.rows_of_tile, args.rows_of_tile);
      for (int warp = 0; warp < args.score_warps; ++warp)
        sum += sums[(row_tile * args.score_warps + warp) * args.rows_of_tile + row % args.rows_of_tile];
    }
    return sum_of_block<kThreads>(sum);
  };
  if (args.grad_bias) {
    const double sum = sum_of(args.bias_sum);
    if (threadIdx.x == 0) args.grad_bias[blockIdx.x] = sum;
  }
  if (args.grad_alibi_slopes) {
    const double sum = sum_of(args.slope_sum);
    if (threadIdx.x == 0) args.grad_alibi_slopes[blockIdx.x] = sum;
  }
}

void launch_parameter_sums(const ParameterSumsArguments& args, cudaStream_t stream) {
  if (args.grad_bias || args.grad_alibi_slopes)
    launch_kernel("attnx_parameter_sums", attnx_parameter_sums, args.batch * args.heads_q, kThreads, 0, stream, args);
}

}  // namespace attnx::cuda
