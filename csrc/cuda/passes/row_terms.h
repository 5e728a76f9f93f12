// This pass before the backward computes what a row adds to its logits, and what a normalised score subtracts from the
// gradients of its weights.
#pragma once

#include "cuda/common/device.h"
#include "cuda/common/ptx.h"
#include "cuda/mainloop/backward_arguments.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

template <class Score>
struct RowTermsArguments : BackwardGeometry {
  Tensor output, grad_output, logsumexp, grad_logsumexp;  // of normalised scores
  typename Score::Parameters score;
  float *offset, *delta;  // as in BackwardScratch, and so are sharpened rows
  SharpenedRow* sharpened;
  int rows_of_tile;
};

// A block has a tile of rows, and eight lanes share a row. Rows past the sequence weigh nothing.
template <class Score, class Input, bool kAligned>
__global__ void __launch_bounds__(256) attnx_row_terms(const __grid_constant__ RowTermsArguments<Score> args) {
  constexpr int kLanes = 8;
  int block = blockIdx.x;
  const int query_block = args.query_blocks.split(block), batch = block % int(args.batch);
  const int head = block / int(args.batch);
  const Sequence sequence = sequence_of(args, batch);
  const int row_begin = query_block * args.rows_of_tile, row_end = sequence.length_q * args.group.divisor();
  const int block_begin = query_block / args.tiles_of_block * args.tiles_of_block * args.rows_of_tile;
  if (block_begin >= row_end && args.cu_seqlens_q) return;  // the place is that of another sequence's tile
  const std::int64_t row_tile =
      head * args.row_tiles + row_tile_of(args, batch, sequence, query_block, args.rows_of_tile);

  for (int r = threadIdx.x / kLanes; r < args.rows_of_tile; r += blockDim.x / kLanes) {
    const int row = row_begin + r, lane = threadIdx.x % kLanes;
    float offset = Score::kNormalised ? -INFINITY : 0, delta = 0;
    SharpenedRow sharpened = {0, 0, 0, 1};
    if (row < row_end) {
      const int query = args.group.divide(row);
      const int query_head = query_head_of(args, head) + row - query * args.group.divisor();
      if constexpr (!Score::kNormalised) {
        offset = args.score.row_bias_log2(sequence.band, query_head, query);
      } else {
        const auto row_of = [&]<class Element>(const Tensor& x, Element*) {
          return rows_of<Element>(x, batch, query_head, sequence.first_q + query);
        };
        const auto* output = row_of(args.output, static_cast<const Input*>(nullptr));
        const auto* grad_output = row_of(args.grad_output, static_cast<const Input*>(nullptr));
        if constexpr (kAligned) {
          for (int d = lane * 8; d < int(args.value_dim); d += kLanes * 8) {
            const uint4 x = __ldg(reinterpret_cast<const uint4*>(output + d));
            const uint4 y = __ldg(reinterpret_cast<const uint4*>(grad_output + d));
#pragma unroll
            for (int e = 0; e < 8; ++e)
              delta = fmaf(float(reinterpret_cast<const Input*>(&x)[e]), float(reinterpret_cast<const Input*>(&y)[e]),
                           delta);
          }
        } else {
          for (int d = lane; d < int(args.value_dim); d += kLanes)
            delta = fmaf(float(output[d]), float(grad_output[d]), delta);
        }
        const float logsumexp = *row_of(args.logsumexp, static_cast<const float*>(nullptr));
        if (logsumexp != -INFINITY) offset = -logsumexp * kLog2E;  // else the row sees no key and has no sink
        if (lane == 0) delta -= *row_of(args.grad_logsumexp, static_cast<const float*>(nullptr));
        if constexpr (requires { args.score.gain; })
          sharpened = {*row_of(args.score.gain, static_cast<const float*>(nullptr)),
                       *row_of(args.score.shift, static_cast<const float*>(nullptr)), 0, args.score.power};
      }
    }
    if constexpr (Score::kNormalised) {
#pragma unroll
      for (int i = kLanes / 2; i > 0; i /= 2) delta += __shfl_xor_sync(~0u, delta, i);
    }
    if constexpr (Score::template Backward<Input>::kHasRows) offset = exp2_approx(offset);
    if (lane == 0) {
      args.offset[row_tile * args.rows_of_tile + r] = offset;
      if (Score::kNormalised) args.delta[row_tile * args.rows_of_tile + r] = delta;
      if constexpr (requires { args.score.gain; }) args.sharpened[row_tile * args.rows_of_tile + r] = sharpened;
    }
  }
}

}  // namespace attnx::cuda
