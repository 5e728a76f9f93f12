// This is the mainloop for sm_80 that sums over scores: it has no product with values behind the score.
//
// A reduction says what a block owns, a tile of keys for instance, and which tiles of rows and keys the block walks
// over for it. A step does this:
//
//   wait for Q and K (dO and V), all threads meet, copy the next ones | S = Q K^T | place logits, if the tile is not
//   whole or has terms | dP = dO V^T, if the summand asks for it | x = summand(S, dP) | the reduction takes x
//
// Most reductions add() x to what a thread keeps. One that must know where the step stands has add_step() instead.
//
// With one stage the next tiles are copied at the end of a step instead. Nothing that a block owns is another block's,
// so that there are no atomics and sums have one order. Weights are float32, and no product rounds them.
#pragma once

#include "cuda/common/tile.h"
#include "cuda/mainloop/sums_arguments.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

// This is what the logits of a step are told of it.
struct SumPlace {
  const Sequence& sequence;
  int batch;
};

template <class Score, class Summand, class Reduction, class Storage, class Tile, class Logits>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) attnx_sums_sm80(
    const __grid_constant__ SumsArguments<typename Summand::template Rows<Score>, Reduction, Storage, Logits> args) {
  using Input = typename Storage::Input;
  constexpr int kM = Tile::kM, kN = Tile::kN, kHeadDim = Tile::kHeadDim, kThreads = Tile::kThreads;
  using RowTile = SharedTile<kM, kHeadDim>;
  using KeyTile = SharedTile<kN, kHeadDim>;
  constexpr int kRows = Tile::kWarpRows / 8;  // rows of S that a thread has a part of

  constexpr int kRowStages = Reduction::kRowsStay ? 1 : Tile::kStages;
  constexpr int kKeyStages = Reduction::kKeysStay ? 1 : Tile::kStages;
  constexpr int kSides = Summand::kHasGradient ? 2 : 1;  // Q and K; dO and V
  static_assert(kSides * (kRowStages * RowTile::kBytes + kKeyStages * KeyTile::kBytes) == Tile::kSharedBytes);

  extern __shared__ uint4 shared[];
  const std::uint32_t shared_query = shared_address(shared);
  const std::uint32_t shared_key = shared_query + kRowStages * RowTile::kBytes;
  const std::uint32_t shared_grad_output = shared_key + kKeyStages * KeyTile::kBytes;
  const std::uint32_t shared_value = shared_grad_output + kRowStages * RowTile::kBytes;
  const auto rows_at = [](int step) { return step % kRowStages * RowTile::kBytes; };
  const auto keys_at = [](int step) { return step % kKeyStages * KeyTile::kBytes; };

  typename Reduction::template Walk<Tile> walk(args, blockIdx.x);
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
      if (!Reduction::kRowsStay || step == 0) {
        load_rows(shared_query + rows_at(step), args.tensors.query, int(args.head_dim), step);
        if constexpr (Summand::kHasGradient)
          load_rows(shared_grad_output + rows_at(step), args.tensors.grad_output, int(args.value_dim), step);
      }
      if (!Reduction::kKeysStay || step == 0) {
        load_keys(shared_key + keys_at(step), args.tensors.key, int(args.head_dim), step);
        if constexpr (Summand::kHasGradient)
          load_keys(shared_value + keys_at(step), args.tensors.value, int(args.value_dim), step);
      }
    }
    commit_copies();
  };

  typename Reduction::template Sums<Tile> sums;
  if constexpr (!Reduction::kCopiesLate) copy(walk.begin());
#pragma unroll 1
  for (int step = walk.begin(); step < walk.end();) {
    if constexpr (Reduction::kCopiesLate) {
      __syncthreads();  // all have read the tiles of the step before
      copy(step);
    }
    wait_copies<0>();
    __syncthreads();
    if constexpr (Tile::kStages == 2) copy(walk.next(step));

    const Sequence& sequence = walk.sequence(step);
    const int row = walk.row(step), key = walk.key(step), head = walk.head(step);
    // Rows past the sequence weigh nothing.
    const typename Summand::template Head<Score> numbers(args.rows, walk.batch(step), sequence, head);
    using Other = decltype(numbers.other(0));
    float offset[kRows];
    Other other[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int own = row + warp_row + lane / 4 + row_of(r);
      offset[r] = own < sequence.length_q ? numbers.offset(own) : -INFINITY;
      other[r] = own < sequence.length_q ? numbers.other(own) : Other{};
      if constexpr (Reduction::kHasBias) offset[r] += walk.bias(step) * kLog2E;
    }

    Accumulators<Tile::kWarpRows, Tile::kWarpKeys> s;
    clear(s);
    multiply<Input, kHeadDim>(s, OperandA<RowTile>(shared_query + rows_at(step), fresh(lane), warp_row),
                              OperandB<KeyTile>(shared_key + keys_at(step), fresh(lane), warp_key));
    const Visible plain = sequence.band.seen_by_all(row, min(row + kM, sequence.length_q) - 1);
    typename Logits::template Backward<Score, Input, Tile::kWarpRows / 16, Tile::kWarpKeys / 8> logits;
    float multiplier = args.scale_log2;
    const bool ragged = key < plain.first || key + kN > plain.end || args.alibi_slopes.data;
    if (Logits::kEveryTile || ragged) {
      logits.place(s, args, SumPlace{sequence, walk.batch(step)}, head, row + warp_row + fresh(lane) / 4,
                   key + warp_key + fresh(lane) % 4 * 2, ragged);
      multiplier = 1;
    }

    Accumulators<Tile::kWarpRows, Tile::kWarpKeys> grad_weights;
    clear(grad_weights);
    if constexpr (Summand::kHasGradient)
      multiply<Input, kHeadDim>(grad_weights,
                                OperandA<RowTile>(shared_grad_output + rows_at(step), fresh(lane), warp_row),
                                OperandB<KeyTile>(shared_value + keys_at(step), fresh(lane), warp_key));
    logits.drop(grad_weights, args);
#pragma unroll
    for (int m = 0; m < Tile::kWarpRows / 16; ++m)
#pragma unroll
      for (int n = 0; n < Tile::kWarpKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = s[m][n][e];
          const int r = m * 2 + e / 2;
          x = Summand::template of<Score, Input>(args.rows, fmaf(x, multiplier, offset[r]), grad_weights[m][n][e],
                                                 other[r]);
          x = logits.weight(x, n, e % 2);
        }
    if constexpr (requires { sums.add_step(s, args, walk, step); })
      sums.add_step(s, args, walk, step);
    else
      sums.template add<Summand::kHasFactor>(s, other);

    step = walk.next(step);
    if constexpr (Tile::kStages == 1 && !Reduction::kCopiesLate) {
      __syncthreads();
      copy(step);
    }
  }
  wait_copies<0>();
  sums.store(args, walk);
}

}  // namespace attnx::cuda
