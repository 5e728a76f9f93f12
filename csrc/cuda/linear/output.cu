#include "cuda/linear/kernels.h"
#include "cuda/linear/operands.h"
#include "cuda/mainloop/backward_rows.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kParts = kThreads / kLinearRows;

// A block makes a tile of rows of the output from the sum over its scope, and from blocks of keys that only some
// queries of its block see, pair by pair. A warp has 16 rows.
template <class Input, int kDim>
__global__ void __launch_bounds__(kThreads, kDim < 128 ? 3 : 1)
    attnx_linear_output(const __grid_constant__ LinearOutputArguments args) {
  using Tile = LinearTile<kDim>;
  extern __shared__ uint4 shared[];
  __shared__ float last[kDim], row_sums[kLinearRows];
  const std::uint32_t query = shared_address(shared), buffer = query + Tile::kBytes;

  const QueryTile unit = QueryTile::of(args, blockIdx.x);
  const Sequence& sequence = unit.sequence;
  const int row_begin = unit.row_begin, head = unit.head, block = unit.block;
  if (row_begin >= sequence.length_q) return;

  const RowLoader<Input, Tile, kThreads> load{args, unit.batch};
  load(query, args.query, head, sequence.first_q, row_begin, sequence.length_q, args.head_dim);
  const Input* const sum = unit.sum<Input>(args);
  read_last_column<Input, kDim, kThreads>(last, args.state, sum);
  finish_copies();
  const int own_row = row_begin + threadIdx.x / kParts;
  map_features<Input, Tile, kThreads>(query, args.feature_map, int(args.head_dim), own_row < sequence.length_q);
  __syncwarp();
  const float of_sum = dot_row<Input, Tile, kThreads>(query, last);
  if (threadIdx.x % kParts == 0) row_sums[threadIdx.x / kParts] = of_sum;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Accumulators<16, kDim> output;
  clear(output);
#pragma unroll 1
  for (int feature = 0; feature < args.head_dim; feature += kLinearRows) {
    __syncthreads();
    load_state<Input, Tile, kThreads>(buffer, args.state, sum, feature);
    finish_copies();
    multiply<Input, kLinearRows>(output, ColumnsA<Tile>{OperandA<Tile>(query, fresh(lane), warp * 16), feature},
                                 TransposedB<Tile>(buffer, fresh(lane)));
  }

  float paired[2] = {};  // sums of weights of the thread's rows
  const SeenBlocks seen = seen_blocks(args, sequence, block);
  const std::int8_t* const labels = labels_of(args, unit.batch, head, block);
  const float scale = scope_scale(args, unit.batch, head, block) / float(args.block_k);
  const auto load_keys = [&](const Tensor& x, int key, std::int64_t features) {
    __syncthreads();
    load(buffer, x, unit.key_head, sequence.first_k, key, sequence.band.length_k, features);
    finish_copies();
  };
  const int last_row = min(row_begin + kLinearRows, sequence.length_q) - 1;
  const int key_end = min(seen.some * args.block_k, sequence.band.visible(last_row).end);
#pragma unroll 1
  for (int key = seen.all * args.block_k; key < key_end; key += kLinearRows) {
    if (!in_scope(args, labels[key / args.block_k])) continue;
    load_keys(args.key, key, args.head_dim);
    map_features<Input, Tile, kThreads>(buffer, args.feature_map, int(args.head_dim), 1);
    __syncthreads();
    Accumulators<16, kLinearRows> weights;
    clear(weights);
    multiply<Input, kDim>(weights, OperandA<Tile>(query, fresh(lane), warp * 16), OperandB<Tile>(buffer, fresh(lane)));
    hide(weights, sequence, row_begin + warp * 16, key, scale);
#pragma unroll
    for (int n = 0; n < kLinearRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) paired[e / 2] += weights[0][n][e];
    load_keys(args.value, key, args.value_dim);
    multiply<Input, kLinearRows>(output, RoundedA<kLinearRows>(weights, Input()),
                                 TransposedB<Tile>(buffer, fresh(lane)));
  }

  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float n = row_sums[warp * 16 + half * 8 + lane / 4] + sum_of_quad(paired[half]);
    const float inverse = n == 0 ? 0.0f : 1 / n;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) output[0][i][half * 2 + e] *= inverse;
  }
  store_accumulators<Tile, Input>(query, warp * 16, 0, lane, output, 1);
  __syncthreads();
  const QueryTile own = QueryTile::of(args, fresh(int(blockIdx.x)));
  const StridedRows<Input> to{rows_of<Input>(args.output, own.batch, own.head, own.sequence.first_q),
                              args.output.row_stride};
  const auto store = [&]<bool kAligned>() {
    store_tile<kAligned, Tile, kLinearRows, kThreads>(query, 0, to, own.row_begin, own.sequence.length_q,
                                                      int(args.value_dim), threadIdx.x);
  };
  args.aligned ? store.template operator()<true>() : store.template operator()<false>();
}

}  // namespace

void launch_linear_output(const LinearOutputArguments& args, DType dtype, cudaStream_t stream) {
  with_linear_kernel(args, dtype, [&]<class Input, int kDim>() {
    launch_kernel("attnx_linear_output", attnx_linear_output<Input, kDim>, query_tiles(args), kThreads,
                  2 * LinearTile<kDim>::kBytes, stream, args);
  });
}

}  // namespace attnx::cuda
