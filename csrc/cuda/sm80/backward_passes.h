// The passes around the backward's main kernel: what it adds to each row's logits and subtracts from the gradients of
// its weights, the order of its sums over lists, and the gradients of bias and slopes from its sums.
#pragma once

#include "cuda/backward_rows.h"
#include "cuda/score/sigmoid.h"
#include "cuda/score/softmax.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

// args.offset and args.delta of a tile of rows a block, eight lanes a row; rows past the sequence weigh nothing.
template <Score kScore, class Input, bool kAligned>
__global__ void __launch_bounds__(256)
    attnx_row_terms(const __grid_constant__ BackwardArguments args, int rows_of_tile) {
  constexpr int kLanes = 8;
  const auto& call = args.call;
  int block = blockIdx.x;
  const int query_block = args.query_blocks.split(block), batch = block % int(call.batch);
  const int head = block / int(call.batch);
  const Sequence sequence = args.sequence(batch);
  const int row_begin = query_block * rows_of_tile, row_end = sequence.length_q * args.group.divisor();
  if (row_begin >= row_end && call.cu_seqlens_q) return;  // the place of another sequence's tile
  const std::int64_t row_tile = head * args.row_tiles + args.row_tile(batch, sequence, query_block, rows_of_tile);

  for (int r = threadIdx.x / kLanes; r < rows_of_tile; r += blockDim.x / kLanes) {
    const int row = row_begin + r, lane = threadIdx.x % kLanes;
    float offset = kScore == Score::kSoftmax ? -INFINITY : 0, delta = 0;
    if (row < row_end) {
      const int query = args.group.divide(row), query_head = args.query_head(head) + row - query * args.group.divisor();
      if constexpr (kScore == Score::kSigmoid) {
        offset = sigmoid_bias_log2(args, sequence.band, query_head, query);
      } else {
        const auto row_of = [&]<class Element>(const Tensor& x, Element*) {
          return rows_of<Element>(x, batch, query_head, sequence.first_q + query);
        };
        const auto* output = row_of(call.output, static_cast<const Input*>(nullptr));
        const auto* grad_output = row_of(call.grad_output, static_cast<const Input*>(nullptr));
        if constexpr (kAligned) {
          for (int d = lane * 8; d < int(call.value_dim); d += kLanes * 8) {
            const uint4 x = __ldg(reinterpret_cast<const uint4*>(output + d));
            const uint4 y = __ldg(reinterpret_cast<const uint4*>(grad_output + d));
#pragma unroll
            for (int e = 0; e < 8; ++e)
              delta = fmaf(float(reinterpret_cast<const Input*>(&x)[e]), float(reinterpret_cast<const Input*>(&y)[e]),
                           delta);
          }
        } else {
          for (int d = lane; d < int(call.value_dim); d += kLanes)
            delta = fmaf(float(output[d]), float(grad_output[d]), delta);
        }
        const float logsumexp = *row_of(call.logsumexp, static_cast<const float*>(nullptr));
        if (logsumexp != -INFINITY) offset = -logsumexp * kLog2E;  // else the row sees no key
        if (lane == 0) delta -= *row_of(call.grad_logsumexp, static_cast<const float*>(nullptr));
      }
    }
    if constexpr (kScore == Score::kSoftmax) {
#pragma unroll
      for (int i = kLanes / 2; i > 0; i /= 2) delta += __shfl_xor_sync(~0u, delta, i);
    }
    if (lane == 0) {
      args.offset[row_tile * rows_of_tile + r] = offset;
      if (kScore == Score::kSoftmax) args.delta[row_tile * rows_of_tile + r] = delta;
    }
  }
}

// args.list_order: a block the list of a block of keys and query head, a warp an entry of it.
__global__ void __launch_bounds__(256)
    attnx_list_order(const __grid_constant__ BackwardArguments args, int key_blocks) {
  const auto& call = args.call;
  const int key_block = blockIdx.x % key_blocks, query_head = blockIdx.x / key_blocks % int(call.heads_q);
  const int batch = blockIdx.x / key_blocks / int(call.heads_q);
  const List queries(call.query_blocks, batch, query_head, key_block);
  for (int entry = threadIdx.x / 32; entry < queries.count(); entry += blockDim.x / 32) {
    const List keys(call.key_blocks, batch, query_head, queries.index(entry));
    int before = 0;
    for (int i = threadIdx.x % 32; i < keys.count(); i += 32) before += keys.index(i) < key_block;
    before = __reduce_add_sync(~0u, before);
    if (threadIdx.x % 32 == 0) args.list_order[queries.entry(entry) - call.query_blocks.indices] = before;
  }
}

// The sums of args.bias_sum and args.slope_sum over the rows of a sequence and head, which are a block's.
__global__ void __launch_bounds__(256)
    attnx_parameter_sums(const __grid_constant__ BackwardArguments args, int rows_of_tile, int score_warps) {
  const auto& call = args.call;
  const int query_head = blockIdx.x % int(call.heads_q), batch = blockIdx.x / int(call.heads_q);
  const Sequence sequence = args.sequence(batch);
  const int head = query_head / args.group.divisor(), place_in_group = query_head % args.group.divisor();
  const auto sum_of = [&](const float* sums) {
    double sum = 0;
    for (int query = threadIdx.x; query < sequence.length_q; query += blockDim.x) {
      const int row = query * args.group.divisor() + place_in_group;
      const std::int64_t row_tile =
          head * args.row_tiles + args.row_tile(batch, sequence, row / rows_of_tile, rows_of_tile);
      for (int warp = 0; warp < score_warps; ++warp)
        sum += sums[(row_tile * score_warps + warp) * rows_of_tile + row % rows_of_tile];
    }
    __shared__ double of_warp[8];
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    __syncthreads();  // the readers of an earlier sum
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (const double x : of_warp) sum += x;
    return sum;
  };
  if (args.bias_sum) {
    const double sum = sum_of(args.bias_sum);
    if (threadIdx.x == 0) call.grad_bias[blockIdx.x] = sum;
  }
  if (args.slope_sum) {
    const double sum = sum_of(args.slope_sum);
    if (threadIdx.x == 0) call.grad_alibi_slopes[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(256)
    attnx_sum_over_batch(const double* from, float* to, std::int64_t batch, std::int64_t heads) {
  const std::int64_t head = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (head >= heads) return;
  double sum = 0;
  for (std::int64_t b = 0; b < batch; ++b) sum += from[b * heads + head];
  to[head] = float(sum);
}

}  // namespace attnx::cuda
