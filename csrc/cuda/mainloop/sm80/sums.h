// This is the mainloop for sm_80 that sums over scores: it has no product with values behind the score.
//
// A reduction says what a block owns, a number for each listed block of keys for instance, and which tiles of rows and
// keys the block walks over for it. A step does this:
//
//   wait for Q and K (dO and V), all threads meet | S = Q K^T | place logits, if the tile is not whole |
//   dP = dO V^T, if the summand asks for it | x = summand(S, dP) | the reduction adds x | copy the next tiles
//
// Nothing that a block owns is another block's, so that there are no atomics and sums have one order. Weights are those
// of the backward, in float32: no product rounds them.
#pragma once

#include "cuda/common/logits.h"
#include "cuda/common/tile.h"
#include "cuda/mainloop/row_numbers.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

template <class Score, class Summand, class Reduction, class Storage, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    attnx_sums_sm80(const __grid_constant__ SumsArguments<Reduction, Storage> args) {
  using Input = typename Storage::Input;
  constexpr int kM = Tile::kM, kN = Tile::kN, kHeadDim = Tile::kHeadDim, kThreads = Tile::kThreads;
  using RowTile = SharedTile<kM, kHeadDim>;
  using KeyTile = SharedTile<kN, kHeadDim>;
  constexpr int kRows = Tile::kWarpRows / 8;  // rows of S that a thread has a part of

  extern __shared__ uint4 shared[];
  const std::uint32_t shared_query = shared_address(shared);
  const std::uint32_t shared_key = shared_query + RowTile::kBytes;
  const std::uint32_t shared_grad_output = shared_key + KeyTile::kBytes;
  const std::uint32_t shared_value = shared_grad_output + RowTile::kBytes;

  const typename Reduction::template Walk<Tile> walk(args, blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % Tile::kRowWarps * Tile::kWarpRows, warp_key = warp / Tile::kRowWarps * Tile::kWarpKeys;

  const auto load_rows = [&](std::uint32_t to, const Tensor& x, int features, int step) {
    const Sequence& sequence = walk.sequence(step);
    const StridedRows<const Input> rows{rows_of<const Input>(x, walk.batch(step), walk.head(step), sequence.first_q),
                                        x.row_stride};
    Storage::template load<RowTile, kThreads>(to, rows, walk.row(step), sequence.length_q, features, {});
  };
  const auto load_keys = [&](std::uint32_t to, const Tensor& x, int features, int step) {
    const Sequence& sequence = walk.sequence(step);
    const auto keys =
        Storage::template key_rows<const Input>(x, walk.batch(step), key_head_of(args, walk.head(step)), sequence);
    Storage::template load<KeyTile, kThreads>(to, keys, walk.key(step), sequence.band.length_k, features, {});
  };
  const auto copy = [&](int step) {
    if (step < walk.end()) {
      load_rows(shared_query, args.tensors.query, int(args.head_dim), step);
      load_keys(shared_key, args.tensors.key, int(args.head_dim), step);
      if constexpr (Summand::kHasGradient) {
        load_rows(shared_grad_output, args.tensors.grad_output, int(args.value_dim), step);
        load_keys(shared_value, args.tensors.value, int(args.value_dim), step);
      }
    }
    commit_copies();
  };

  typename Reduction::template Sums<Tile> sums;
  copy(0);
#pragma unroll 1
  for (int step = 0; step < walk.end(); ++step) {
    wait_copies<0>();
    __syncthreads();

    const Sequence& sequence = walk.sequence(step);
    const int row = walk.row(step), key = walk.key(step), head = walk.head(step);
    // Rows past the sequence weigh nothing.
    float offset[kRows], other[kRows];
    const std::int64_t first_number = first_number_of(args.rows, walk.batch(step), sequence, head);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int own = row + warp_row + lane / 4 + row_of(r);
      const std::int64_t number = first_number + std::int64_t(own) * args.rows.layout.group.divisor();
      offset[r] = own < sequence.length_q ? __ldg(args.rows.offset + number) : -INFINITY;
      other[r] = own < sequence.length_q && args.rows.other ? __ldg(args.rows.other + number) : 0;
      if constexpr (Reduction::kHasBias) offset[r] += walk.bias() * kLog2E;
    }

    Accumulators<Tile::kWarpRows, Tile::kWarpKeys> s;
    clear(s);
    multiply<Input, kHeadDim>(s, OperandA<RowTile>(shared_query, fresh(lane), warp_row),
                              OperandB<KeyTile>(shared_key, fresh(lane), warp_key));
    const Visible plain = sequence.band.seen_by_all(row, min(row + kM, sequence.length_q) - 1);
    float multiplier = args.scale_log2;
    if (key < plain.first || key + kN > plain.end || args.alibi_slopes.data) {
      place_logits(s, args, sequence.band, head, row + warp_row + fresh(lane) / 4,
                   key + warp_key + fresh(lane) % 4 * 2);
      multiplier = 1;
    }

    Accumulators<Tile::kWarpRows, Tile::kWarpKeys> grad_weights;
    clear(grad_weights);
    if constexpr (Summand::kHasGradient)
      multiply<Input, kHeadDim>(grad_weights, OperandA<RowTile>(shared_grad_output, fresh(lane), warp_row),
                                OperandB<KeyTile>(shared_value, fresh(lane), warp_key));
#pragma unroll
    for (int m = 0; m < Tile::kWarpRows / 16; ++m)
#pragma unroll
      for (int n = 0; n < Tile::kWarpKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = s[m][n][e];
          const int r = m * 2 + e / 2;
          x = Summand::template of<Score, Input>(fmaf(x, multiplier, offset[r]), grad_weights[m][n][e], other[r]);
        }
    sums.add(s);

    __syncthreads();
    copy(step + 1);
  }
  wait_copies<0>();
  sums.store(args, walk);
}

}  // namespace attnx::cuda
