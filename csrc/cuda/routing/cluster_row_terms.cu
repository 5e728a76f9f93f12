#include "cluster_row_terms.h"

#include "cuda/common/device.h"
#include "cuda/common/element.h"
#include "cuda/score/sigmoid.h"
#include "cuda/score/softmax.h"
#include "cuda/tiles/clustered.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128;

template <class Score>
struct Arguments : ClusterRowTermsArguments {
  typename Score::Parameters score;
};

}  // namespace

// A block has a tile of rows, and a warp a row. Rows behind the cluster weigh nothing.
template <class Score, class Input>
__global__ void __launch_bounds__(kThreads) attnx_cluster_row_terms(const __grid_constant__ Arguments<Score> args) {
  const ClusterTile tile = read_tile(args.tiles.table + blockIdx.x);
  if (tile.head < 0) return;
  const ClusterSequence sequence = cluster_sequence(args.tiles, tile);
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < args.rows_of_tile; r += kThreads / 32) {
    const int query = tile.begin + r;
    float offset = Score::kNormalised ? -INFINITY : 0, delta = 0;
    if (query < tile.length_q) {
      if constexpr (!Score::kNormalised) {
        offset = args.score.row_bias_log2(sequence.band, 0, query);
      } else {
        const std::int64_t slot = tile.head * args.tiles.slots + tile.first_q + query;
        const Input* output = static_cast<const Input*>(args.output) + slot * args.padded;
        const Input* grad_output =
            static_cast<const Input*>(args.grad_output) + (tile.head * args.rows + args.indices[slot]) * args.padded;
        for (int d = lane; d < args.features; d += 32) delta = fmaf(float(output[d]), float(grad_output[d]), delta);
#pragma unroll
        for (int i = 16; i > 0; i /= 2) delta += __shfl_xor_sync(~0u, delta, i);
        delta -= args.grad_logsumexp[slot];
        const float logsumexp = args.logsumexp[slot];
        if (logsumexp != -INFINITY) offset = -logsumexp * kLog2E;  // else the row sees no key
      }
    }
    if (lane != 0) continue;
    args.offset[std::int64_t(blockIdx.x) * args.rows_of_tile + r] = offset;
    if (Score::kNormalised) args.delta[std::int64_t(blockIdx.x) * args.rows_of_tile + r] = delta;
  }
}

void launch_cluster_row_terms(const ClusterRowTermsArguments& args, const AttentionParams& p, std::int64_t tiles,
                              cudaStream_t stream) {
  const auto launch = [&]<class Score>(Score, auto* kernel) {
    launch_kernel("attnx_cluster_row_terms", kernel, tiles, kThreads, 0, stream,
                  Arguments<Score>{args, Score::parameters(p)});
  };
  if (p.score == Score::kSigmoid) return launch(Sigmoid(), attnx_cluster_row_terms<Sigmoid, __half>);
  launch(Softmax(), p.dtype == DType::kBFloat16 ? attnx_cluster_row_terms<Softmax, __nv_bfloat16>
                                                : attnx_cluster_row_terms<Softmax, __half>);
}

}  // namespace attnx::cuda
