// The forward mainloop for sm_80: mma.sync on tiles that cp.async brings to shared memory (FlashAttention-2, Dao 2023).
//
// A block owns a tile of rows (query, head of the group) and walks over the tiles of keys. A step:
//
//   wait for K, all threads meet | copy the V of this step | S = Q K^T | wait for V, meet | copy the next K |
//   place logits, if the tile is not whole | score | O += P V
//
// so that V's copy runs under the first product and the next K's under the score and the second. With two stages each
// copy starts one step earlier. A thread's weights are made, packed and multiplied 16 keys at a time: P stays in the
// registers of S, and the special functions of one chunk run beside the products of the one before.
#pragma once

#include "cuda/forward_rows.h"
#include "cuda/logits.h"
#include "cuda/score/sigmoid.h"
#include "cuda/score/softmax.h"
#include "cuda/sm80/tile_sizes.h"
#include "cuda/storage/strided.h"
#include "cuda/tiles/band.h"
#include "cuda/tiles/listed.h"

namespace attnx::cuda {

// The sigmoid's formula: with few features to multiply, special functions would take as long as the tensor cores.
template <Score kScore, class Input, int kHeadDim, int kRows>
using ForwardScore =
    std::conditional_t<kScore == Score::kSoftmax, SoftmaxForward<Input, kRows>,
                       SigmoidForward<Input, std::conditional_t<kHeadDim <= 64, NewtonSigmoid, ExactSigmoid>, kRows>>;

template <Score kScore, class Input, bool kListed, bool kAligned, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    attnx_forward_sm80(const __grid_constant__ ForwardArguments args) {
  using QueryTile = SharedTile<Tile::kM, Tile::kHeadDim>;
  using KeyTile = SharedTile<Tile::kN, Tile::kHeadDim>;
  constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages, kN = Tile::kN, kHeadDim = Tile::kHeadDim;
  constexpr int kRows = Tile::kWarpRows / 8;  // that a thread has a part of

  extern __shared__ uint4 shared[];
  const std::uint32_t shared_query = shared_address(shared);
  const std::uint32_t shared_key = shared_query + QueryTile::kBytes;
  const std::uint32_t shared_value = shared_key + kStages * KeyTile::kBytes;

  const auto& call = args.call;
  const ForwardPlace place = ForwardPlace::of(args, blockIdx.x, Tile());
  const auto& [split, query_block, head, batch, sequence, row_begin, row_end] = place;
  if (row_begin >= row_end) return;
  const Band& band = sequence.band;
  const int first_query = args.group.divide(row_begin);
  const int last_query = args.group.divide(min(row_begin + Tile::kM, row_end) - 1);

  const auto tiles = [&] {
    if constexpr (kListed) {
      return ListedTiles<kN>(List(call.key_blocks, batch, head, row_begin / int(call.block_q)), int(call.block_k));
    } else {
      return BandTiles<kN>(band, first_query, last_query, split, args.splits.divisor());
    }
  }();
  const int begin = tiles.begin(), end = tiles.end();

  const auto key_rows = [&](const Tensor& x) {
    return StridedRows<const Input>{fresh(rows_of<const Input>(x, batch, args.key_head(head), sequence.first_k)),
                                    x.row_stride};
  };
  const auto keys = key_rows(call.key), values = key_rows(call.value);

  // A copy past the last tile is an empty group, which keeps the count of groups the same in every step.
  const auto copy_key = [&](int tile, int key) {
    if (tile < end)
      load_tile<kAligned, KeyTile, kThreads>(shared_key + tile % kStages * KeyTile::kBytes, keys, key, band.length_k,
                                             int(call.head_dim));
    commit_copies();
  };
  const auto copy_value = [&](int tile, int key) {
    if (tile < end)
      load_tile<kAligned, KeyTile, kThreads>(shared_value + tile % kStages * KeyTile::kBytes, values, key,
                                             band.length_k, int(call.value_dim));
    commit_copies();
  };
  // The first keys of this tile and the next ones. From a list they are read well before they are needed.
  int listed[kStages + 1] = {};
  const auto key_of = [&](int tile) { return tile < end ? tiles.key(tile) : 0; };
  const auto key_ahead = [&](int tile, int ahead) {
    if constexpr (kListed) return listed[ahead];
    return tiles.key(tile + ahead);
  };
  if constexpr (kListed) {
#pragma unroll
    for (int i = 0; i <= kStages; ++i) listed[i] = key_of(begin + i);
  }

  load_tile<kAligned, QueryTile, kThreads>(shared_query, place.rows<const Input>(args, call.query), row_begin, row_end,
                                           int(call.head_dim));
  copy_key(begin, key_ahead(begin, 0));
  if constexpr (kStages == 2) {
    copy_value(begin, key_ahead(begin, 0));
    copy_key(begin + 1, key_ahead(begin, 1));
  }

  const auto lane_now = [] { return fresh(threadIdx.x) % 32; };
  const auto warp_row_now = [] { return fresh(threadIdx.x) / 32 * Tile::kWarpRows; };  // row within the tile
  ForwardScore<kScore, Input, kHeadDim, kRows> score;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = min(row_begin + warp_row_now() + lane_now() / 4 + row_of(r), row_end - 1),
              query = args.group.divide(row);
    score.set_row(r, args, band, args.query_head(head) + row - query * args.group.divisor(), query);
  }
  // The keys whose logits are a positive multiple of the products, for all rows.
  Visible plain = band.seen_by_all(first_query, last_query);
  if (call.alibi_slopes.data || !(args.scale_log2 > 0)) plain.end = -1;

  Accumulators<Tile::kWarpRows, kHeadDim> output;
  clear(output);

#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    const int stage = tile % kStages;
    wait_copies<2 * (kStages - 1)>();
    __syncthreads();
    copy_value(tile + kStages - 1, key_ahead(tile, kStages - 1));

    Accumulators<Tile::kWarpRows, kN> s;
    clear(s);
    multiply<Input, kHeadDim>(s, OperandA<QueryTile>(shared_query, lane_now(), warp_row_now()),
                              OperandB<KeyTile>(shared_key + stage * KeyTile::kBytes, lane_now()));

    wait_copies<2 * (kStages - 1)>();
    __syncthreads();
    copy_key(tile + kStages, key_ahead(tile, kStages));

    float multiplier = args.scale_log2;
    const int key = key_ahead(tile, 0);
    if (key < plain.first || key + kN > plain.end) {
      const ForwardPlace again = ForwardPlace::of(args, fresh(blockIdx.x), Tile());
      place_logits(s, args, again.sequence.band, args.query_head(again.head),
                   again.row_begin + warp_row_now() + lane_now() / 4, key + lane_now() % 4 * 2);
      multiplier = 1;
    }
    score.template begin<kListed>(s, output, multiplier, tiles.bias(tile) * kLog2E);
    multiply<Input, kN>(output, Weights<decltype(score), kRows / 2, kN / 8>{s, score},
                        TransposedB<KeyTile>(shared_value + stage * KeyTile::kBytes, lane_now()));

    if constexpr (kListed) {
#pragma unroll
      for (int i = 0; i < kStages; ++i) listed[i] = listed[i + 1];
      listed[kStages] = key_of(tile + kStages + 1);
    }
  }
  wait_copies<0>();

  const int lane = lane_now(), warp_row = warp_row_now();
  float logsumexp[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float factor = score.finish(r);
    logsumexp[r] = score.logsumexp(r);
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
      output[r / 2][d][r % 2 * 2] *= factor;
      output[r / 2][d][r % 2 * 2 + 1] *= factor;
    }
  }

  // The place is found again, rather than kept in registers through the loop.
  const ForwardPlace own = ForwardPlace::of(args, fresh(blockIdx.x), Tile());
  const int thread_row = own.row_begin + warp_row + lane / 4;
  if (args.splits.divisor() > 1) {
    store_partial<kScore, Tile::kM>(output, logsumexp, args, own, thread_row, lane);
    return;
  }

  // Through the warp's own rows of the query's tile, which no one else reads any more, to 16-byte stores. Where there
  // was no tile of keys, other threads' copies of the query have only now ended.
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d)
      store_shared(shared_query + QueryTile::offset(warp_row + lane / 4 + row_of(r), d) + lane % 4 * 4,
                   pack(output[r / 2][d][r % 2 * 2], output[r / 2][d][r % 2 * 2 + 1], Input()));
  }
  __syncwarp();
  store_tile<kAligned, QueryTile, Tile::kWarpRows, 32>(shared_query, warp_row, own.rows<Input>(args, call.output),
                                                       own.row_begin + warp_row, own.row_end, int(call.value_dim),
                                                       lane);
  if (call.logsumexp.data && lane % 4 == 0) {
    const auto rows = own.rows<float>(args, call.logsumexp);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (thread_row + row_of(r) < own.row_end) *rows.at(thread_row + row_of(r)) = logsumexp[r];
  }
}

}  // namespace attnx::cuda
