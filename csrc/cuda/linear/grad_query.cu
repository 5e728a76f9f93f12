#include "cuda/linear/gradients.h"
#include "cuda/linear/kernels.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kParts = kThreads / kLinearRows;

// A block makes a tile of rows of dQ, and leaves 1/n and delta of each row. A warp has 16 rows.
template <class Input, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    attnx_linear_grad_query(const __grid_constant__ LinearGradArguments args) {
  using Tile = LinearTile<kDim>;
  extern __shared__ uint4 shared[];
  const std::uint32_t query = shared_address(shared), grad = query + Tile::kBytes, buffer = grad + Tile::kBytes;
  float* const last = reinterpret_cast<float*>(shared + 3 * Tile::kBytes / sizeof(uint4));
  float* const row_sums = last + kDim;
  float* const deltas = row_sums + kLinearRows;

  const QueryTile unit = QueryTile::of(args, blockIdx.x);
  const Sequence& sequence = unit.sequence;
  const int row_begin = unit.row_begin, head = unit.head, block = unit.block;
  if (row_begin >= sequence.length_q) return;

  const RowLoader<Input, Tile, kThreads> load{args, unit.batch};
  const auto load_queries = [&](std::uint32_t tile, const Tensor& x, std::int64_t features) {
    load(tile, x, head, sequence.first_q, row_begin, sequence.length_q, features);
  };
  load_queries(query, args.query, args.head_dim);
  load_queries(grad, args.grad_output, args.value_dim);
  load_queries(buffer, args.output, args.value_dim);
  const Input* const sum = unit.sum<Input>(args);
  read_last_column<Input, kDim, kThreads>(last, args.state, sum);
  finish_copies();
  const int own_row = row_begin + threadIdx.x / kParts;
  map_features<Input, Tile, kThreads>(query, args.feature_map, int(args.head_dim), own_row < sequence.length_q);
  __syncwarp();
  const float of_sum = dot_row<Input, Tile, kThreads>(query, last);
  const float delta = dot_rows<Input, Tile, kThreads>(grad, buffer);
  if (threadIdx.x % kParts == 0) {
    row_sums[threadIdx.x / kParts] = of_sum;
    deltas[threadIdx.x / kParts] = delta;
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto own_rows = [&](std::uint32_t tile) { return OperandA<Tile>(tile, lane, warp * 16); };
  Accumulators<16, kDim> gradient;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      gradient[0][n][e] = -deltas[warp * 16 + e / 2 * 8 + lane / 4] * last[n * 8 + lane % 4 * 2 + e % 2];
#pragma unroll
  for (int feature = 0; feature < kDim; feature += kLinearRows) {
    if (feature >= args.head_dim) break;
    __syncthreads();
    load_state<Input, Tile, kThreads>(buffer, args.state, sum, feature);
    finish_copies();
    multiply<Input, kDim>(columns_of<kLinearRows>(gradient, feature), own_rows(grad), OperandB<Tile>(buffer, lane));
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
    Accumulators<16, kLinearRows> products;  // the gradients of weights, then the weights
    clear(products);
    load_keys(args.value, key, args.value_dim);
    multiply<Input, kDim>(products, own_rows(grad), OperandB<Tile>(buffer, lane));
#pragma unroll
    for (int n = 0; n < kLinearRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) products[0][n][e] -= deltas[warp * 16 + e / 2 * 8 + lane / 4];
    hide(products, sequence, row_begin + warp * 16, key, scale);
    load_keys(args.key, key, args.head_dim);
    map_features<Input, Tile, kThreads>(buffer, args.feature_map, int(args.head_dim), 1);
    __syncthreads();
    multiply<Input, kLinearRows>(gradient, RoundedA<kLinearRows>(products, Input()), TransposedB<Tile>(buffer, lane));
    clear(products);
    multiply<Input, kDim>(products, own_rows(query), OperandB<Tile>(buffer, lane));
    hide(products, sequence, row_begin + warp * 16, key, scale);
#pragma unroll
    for (int n = 0; n < kLinearRows / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) paired[e / 2] += products[0][n][e];
  }

  const QueryTile own = QueryTile::of(args, fresh(int(blockIdx.x)));
  const int first = own.row_begin + warp * 16, end = own.sequence.length_q;
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + lane / 4;
    const float n = row_sums[row] + sum_of_quad(paired[half]);
    inverse[half] = n == 0 ? 0.0f : 1 / n;
    if (lane % 4 == 0 && own.row_begin + row < end)
      args.rows[std::int64_t(own.head_in_launch) * args.length_q + own.row_begin + row] = {inverse[half], deltas[row]};
  }
  differentiate_features<Input, Tile>(gradient, query, warp * 16, args.feature_map, inverse);
  store_sums(gradient, rows_of<float>(args.grad_query, own.batch, own.head, own.sequence.first_q),
             args.grad_query.row_stride, first, end, int(args.head_dim));
}

}  // namespace

void launch_linear_grad_query(const LinearGradArguments& args, DType dtype, cudaStream_t stream) {
  with_linear_kernel(args, dtype, [&]<class Input, int kDim>() {
    launch_kernel("attnx_linear_grad_query", attnx_linear_grad_query<Input, kDim>, query_tiles(args), kThreads,
                  kGradientBytes<kDim>, stream, args);
  });
}

}  // namespace attnx::cuda
