// This is the kernel that makes dK and dV of linear attention.
#pragma once

#include "cuda/linear/gradients.h"
#include "cuda/linear/kernels.h"

namespace attnx::cuda {

inline constexpr int kGradKeysThreads = 256;

// A block makes a tile of rows of dK and dV: four warps, of 16 rows each, make dK, and four make dV. Each of them takes
// the sum over the blocks of queries whose scope holds the block of keys, and then, pair by pair, those of which only
// some queries see it.
template <class Input, int kDim>
__global__ void __launch_bounds__(kGradKeysThreads, 1)
    attnx_linear_grad_keys(const __grid_constant__ LinearGradArguments args) {
  using Tile = LinearTile<kDim>;
  constexpr int kThreads = kGradKeysThreads, kParts = kThreads / kLinearRows;
  extern __shared__ uint4 shared[];
  const std::uint32_t key = shared_address(shared), value = key + Tile::kBytes, buffer = value + Tile::kBytes;
  float* const last = reinterpret_cast<float*>(shared + 3 * Tile::kBytes / sizeof(uint4));
  float* const deltas = last + kDim;

  const KeyTile unit = KeyTile::of(args, blockIdx.x);
  const Sequence& sequence = unit.sequence;
  const int key_begin = unit.row_begin, key_end = sequence.band.length_k, block = unit.block;
  if (key_begin >= key_end) return;

  const RowLoader<Input, Tile, kThreads> load{args, unit.batch};
  load(key, args.key, unit.key_head, sequence.first_k, key_begin, key_end, args.head_dim);
  load(value, args.value, unit.key_head, sequence.first_k, key_begin, key_end, args.value_dim);
  const Input* const sum = unit.sum<Input>(args);
  read_last_column<Input, kDim, kThreads>(last, args.state, sum);
  finish_copies();
  const int own_row = threadIdx.x / kParts;
  map_features<Input, Tile, kThreads>(key, args.feature_map, int(args.head_dim), key_begin + own_row < key_end);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool of_keys = threadIdx.x < kThreads / 2;
  const auto own_rows = [&](std::uint32_t tile) { return OperandA<Tile>(tile, lane, warp * 16); };
  Accumulators<16, kDim> gradient;
  clear(gradient);
#pragma unroll
  for (int feature = 0; feature < kDim; feature += kLinearRows) {
    if (feature >= args.head_dim) break;
    __syncthreads();
    load_state<Input, Tile, kThreads>(buffer, args.state, sum, feature);
    finish_copies();
    if (of_keys)
      multiply<Input, kDim>(columns_of<kLinearRows>(gradient, feature), own_rows(value), OperandB<Tile>(buffer, lane));
    else
      multiply<Input, kLinearRows>(gradient, ColumnsA<Tile>{own_rows(key), feature}, TransposedB<Tile>(buffer, lane));
  }
  // States of queries are means, and those of keys are, too, in whose units 1/n is.
  const float factor = float(args.block_q) / float(args.block_k);
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& x = gradient[0][n][e];
      x = (of_keys ? x + last[n * 8 + lane % 4 * 2 + e % 2] : x) * factor;
    }

#pragma unroll 1
  for (int query_block = max(block * args.block_k - sequence.band.offset, 0) / args.block_q;; ++query_block) {
    if (query_block * args.block_q >= sequence.length_q) break;
    const SeenBlocks seen = seen_blocks(args, sequence, query_block);
    if (seen.all > block) break;
    if (seen.some <= block) continue;
#pragma unroll 1
    for (int head_of_unit = 0; head_of_unit < args.heads_of_unit; ++head_of_unit) {
      const int head = unit.key_head * args.heads_of_unit + head_of_unit;
      if (!in_scope(args, labels_of(args, unit.batch, head, query_block)[block])) continue;
      const float scale = scope_scale(args, unit.batch, head, query_block) / float(args.block_k);
      const LinearRow* const terms =
          args.rows + std::int64_t(unit.index * args.heads_of_unit + head_of_unit) * args.length_q;
      const int row_end = min(query_block * args.block_q + args.block_q, sequence.length_q);
#pragma unroll 1
      for (int row = query_block * args.block_q; row < row_end; row += kLinearRows) {
        const LinearRow own = row + own_row < row_end ? terms[row + own_row] : LinearRow{};
        const auto load_queries = [&] {
          __syncthreads();
          load(buffer, args.query, head, sequence.first_q, row, row_end, args.head_dim);
          finish_copies();
          map_features<Input, Tile, kThreads>(buffer, args.feature_map, int(args.head_dim), own.inverse);
          __syncthreads();
        };
        Accumulators<16, kLinearRows> products;  // weights / n, or their gradients, by (key, query)
        clear(products);
        load_queries();
        if (threadIdx.x % kParts == 0) deltas[own_row] = own.delta;
        if (!of_keys) multiply<Input, kDim>(products, own_rows(key), OperandB<Tile>(buffer, lane));
        __syncthreads();
        load(buffer, args.grad_output, head, sequence.first_q, row, row_end, args.value_dim);
        finish_copies();
        if (of_keys) {
          multiply<Input, kDim>(products, own_rows(value), OperandB<Tile>(buffer, lane));
#pragma unroll
          for (int n = 0; n < kLinearRows / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) products[0][n][e] -= deltas[n * 8 + lane % 4 * 2 + e % 2];
        }
        hide_transposed(products, sequence, row, key_begin + warp * 16, scale);
        const RoundedA<kLinearRows> left(products, Input());
        if (!of_keys) multiply<Input, kLinearRows>(gradient, left, TransposedB<Tile>(buffer, lane));
        load_queries();
        if (of_keys) multiply<Input, kLinearRows>(gradient, left, TransposedB<Tile>(buffer, lane));
      }
    }
  }

  const KeyTile own = KeyTile::of(args, fresh(int(blockIdx.x)));
  const auto store = [&](const Tensor& to, std::int64_t features) {
    store_sums(gradient, rows_of<float>(to, own.batch, own.key_head, own.sequence.first_k), to.row_stride,
               own.row_begin + warp * 16, own.sequence.band.length_k, int(features));
  };
  if (of_keys) {
    differentiate_features<Input, Tile>(gradient, key, warp * 16, args.feature_map, {1, 1});
    store(args.grad_key, args.head_dim);
  } else {
    store(args.grad_value, args.value_dim);
  }
}

}  // namespace attnx::cuda
