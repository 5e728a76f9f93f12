#include "sink_sums.h"

#include "cuda/common/device.h"
#include "cuda/common/reduce.h"
#include "cuda/common/sequence.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256;

}  // namespace

// A block sums over the rows of a sequence and head.
__global__ void __launch_bounds__(kThreads) attnx_sink_sums(const __grid_constant__ SinkSumsArguments args) {
  const int query_head = blockIdx.x % int(args.heads_q), batch = blockIdx.x / int(args.heads_q);
  const Sequence sequence = sequence_of(args, batch);
  const int head = query_head / args.group.divisor(), place_in_group = query_head % args.group.divisor();
  const float sink = of_head(args.sink, query_head);
  const float* logsumexps = rows_of<const float>(args.logsumexp, batch, query_head, sequence.first_q);
  // The tiles of a sequence's rows follow each other.
  const std::int64_t first_tile = head * args.row_tiles + row_tile_of(args, batch, sequence, 0, args.rows_of_tile);
  const float* deltas = args.delta + first_tile * args.rows_of_tile;
  double sum = 0;
  for (int query = threadIdx.x; query < sequence.length_q; query += kThreads) {
    const float logsumexp = logsumexps[query * args.logsumexp.row_stride];
    if (logsumexp == -INFINITY) continue;  // neither a key nor the sink has weight
    sum -= fminf(expf(sink - logsumexp), 1) * deltas[query * args.group.divisor() + place_in_group];
  }
  sum = sum_of_block<kThreads>(sum);
  if (threadIdx.x == 0) args.grad_sink[blockIdx.x] = sum;
}

void launch_sink_sums(const SinkSumsArguments& args, cudaStream_t stream) {
  launch_kernel("attnx_sink_sums", attnx_sink_sums, args.batch * args.heads_q, kThreads, 0, stream, args);
}

}  // namespace attnx::cuda
