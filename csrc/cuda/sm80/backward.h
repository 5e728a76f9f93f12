// The backward mainloop for sm_80 (FlashAttention-2, Dao 2023): dK and dV of a tile of keys, and its part of dQ.
//
// A block owns a tile of keys and walks over the tiles of rows (query, head of the group) that see it. A step:
//
//   wait for Q and dO, all threads meet, copy the next ones | S = Q K^T | P to shared memory | dP = dO V^T
//   dS = derivative * (dP - delta) to shared memory, meet | dV += P^T dO | dQ += dS K, to global memory | dK += dS^T Q
//
// P and dS pass through shared memory, because the products that sum over rows want them transposed. dQ is summed in
// float32 by atomics, in the order of the threads' registers so that a warp's 32 sums lie in one line; a last pass
// scales, rounds and puts them in place. A deterministic backward adds in the order of the tiles of keys: each block
// waits for its turn, which cannot wait for ever, as blocks start in the same order.
//
// The sigmoid has no delta, and no pass over dO and O.
#pragma once

#include "cuda/backward_rows.h"
#include "cuda/logits.h"
#include "cuda/sm80/tile_sizes.h"
#include "cuda/storage/strided.h"

namespace attnx::cuda {

// Tells the next block of keys that this one has added to a tile of rows.
__device__ __forceinline__ void end_turn(int* turns) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(turns, 1);
}

template <Score kScore, class Input, bool kListed, bool kAligned, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attnx_backward_sm80(const __grid_constant__ BackwardArguments args) {
  constexpr int kM = Tile::kM, kN = Tile::kN, kHeadDim = Tile::kHeadDim;
  constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages;
  using RowTile = SharedTile<kM, kHeadDim>;
  using KeyTile = SharedTile<kN, kHeadDim>;
  using ScoreTile = SharedTile<kM, kN>;
  using ScorePolicy = BackwardScore<kScore, Input>;

  extern __shared__ uint4 shared[];
  const std::uint32_t shared_key = shared_address(shared);
  const std::uint32_t shared_value = shared_key + KeyTile::kBytes;
  const std::uint32_t shared_query = shared_value + KeyTile::kBytes;
  const std::uint32_t shared_grad_output = shared_query + kStages * RowTile::kBytes;
  const std::uint32_t shared_weights = shared_grad_output + kStages * RowTile::kBytes;
  const std::uint32_t shared_grad_logits = shared_weights + ScoreTile::kBytes;

  const auto& call = args.call;
  int block = blockIdx.x;
  const int key_begin = args.key_blocks.split(block) * kN, head = args.key_heads.split(block), batch = block;
  const Sequence sequence = args.sequence(batch);
  const Band& band = sequence.band;
  if (key_begin >= band.length_k) return;
  const int row_end = sequence.length_q * args.group.divisor();

  const auto key_rows = [&]<class Element>(const Tensor& x, Element*) {
    return StridedRows<Element>{rows_of<Element>(x, batch, head, sequence.first_k), x.row_stride};
  };
  load_tile<kAligned, KeyTile, kThreads>(shared_key, key_rows(call.key, static_cast<const Input*>(nullptr)), key_begin,
                                         band.length_k, int(call.head_dim));
  load_tile<kAligned, KeyTile, kThreads>(shared_value, key_rows(call.value, static_cast<const Input*>(nullptr)),
                                         key_begin, band.length_k, int(call.value_dim));

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kScoreRows = kM / Tile::kScoreWarps, kScoreKeys = kN / Tile::kScoreWarpsN;
  constexpr int kGradKeys = kN / Tile::kKeyWarps, kGradFeatures = kHeadDim / Tile::kKeyWarpsD;
  constexpr int kQueryRows = kM / Tile::kRowWarps, kQueryFeatures = kHeadDim / Tile::kRowWarpsD;
  static_assert(kScoreRows % 16 == 0 && kScoreKeys % 16 == 0 && kGradKeys % 16 == 0 && kGradFeatures % 16 == 0 &&
                kQueryRows % 16 == 0 && kQueryFeatures % 16 == 0);
  const int score_row = warp % Tile::kScoreWarps * kScoreRows, score_key = warp / Tile::kScoreWarps * kScoreKeys;
  const int grad_key = warp % Tile::kKeyWarps * kGradKeys, grad_feature = warp / Tile::kKeyWarps * 16;
  const int query_row = warp % Tile::kRowWarps * kQueryRows, query_feature = warp / Tile::kRowWarps * 16;
  constexpr int kRows = kScoreRows / 8;  // of S that a thread has a part of

  Accumulators<kGradKeys, kGradFeatures> grad_keys, grad_values;
  clear(grad_keys);
  clear(grad_values);

  // With lists each query head has its own rows; else one tile holds rows of all heads of the group.
  const int turns = kListed ? int(call.heads_q / call.heads_k) : 1;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int query_head = kListed ? head * turns + turn : args.query_head(head);
    const auto tiles = [&] {
      if constexpr (kListed) {
        return ListedTiles<kM>(List(call.query_blocks, batch, query_head, key_begin / int(call.block_k)),
                               int(call.block_q));
      } else {
        return BandRowTiles<kM>(band, key_begin, kN, sequence.length_q, args.group.divisor());
      }
    }();
    const int begin = tiles.begin(), end = tiles.end();
    const auto row_of_tile = [&](int tile) {
      if constexpr (kListed)
        return tiles.key(tile);
      else
        return tiles.row(tile);
    };
    const auto copy_rows = [&](int tile) {
      if (tile < end) {
        const int row = row_of_tile(tile), stage = tile % kStages * RowTile::kBytes;
        const auto rows = [&](const Tensor& x) {
          return GroupedRows<const Input>{rows_of<const Input>(x, batch, query_head, sequence.first_q), x.row_stride,
                                          x.head_stride, args.group};
        };
        load_tile<kAligned, RowTile, kThreads>(shared_query + stage, rows(call.query), row, row_end,
                                               int(call.head_dim));
        load_tile<kAligned, RowTile, kThreads>(shared_grad_output + stage, rows(call.grad_output), row, row_end,
                                               int(call.value_dim));
      }
      commit_copies();
    };
    copy_rows(begin);

#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      const int stage = tile % kStages * RowTile::kBytes;
      wait_copies<0>();
      __syncthreads();
      if constexpr (kStages == 2) copy_rows(tile + 1);

      const int row_begin = row_of_tile(tile);
      const std::int64_t row_tile =
          (kListed ? query_head : head) * args.row_tiles + args.row_tile(batch, sequence, row_begin / kM, kM);
      float offset[kRows], delta[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t row = row_tile * kM + score_row + lane / 4 + row_of(r);
        offset[r] = __ldg(args.offset + row) + (kListed ? tiles.bias(tile) * kLog2E : 0.0f);
        delta[r] = ScorePolicy::kHasDelta ? __ldg(args.delta + row) : 0;
      }

      // S, which becomes what dP - delta is multiplied with.
      Accumulators<kScoreRows, kScoreKeys> s;
      clear(s);
      multiply<Input, kHeadDim>(s, OperandA<RowTile>(shared_query + stage, fresh(lane), score_row),
                                OperandB<KeyTile>(shared_key, fresh(lane), score_key));
      const Visible plain =
          band.seen_by_all(args.group.divide(row_begin), args.group.divide(min(row_begin + kM, row_end) - 1));
      float multiplier = args.scale_log2;
      if (key_begin < plain.first || key_begin + kN > plain.end || call.alibi_slopes.data) {
        place_logits(s, args, band, query_head, row_begin + score_row + lane / 4, key_begin + score_key + lane % 4 * 2);
        multiplier = 1;
      }
#pragma unroll
      for (int m = 0; m < kScoreRows / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int n = 0; n < kScoreKeys / 8; ++n) {
            float (&pair)[4] = s[m][n];
            const auto weight = [&](float& x) {
              return ScorePolicy::weight(fmaf(x, multiplier, offset[m * 2 + half]), x);
            };
            const float low = weight(pair[half * 2]), high = weight(pair[half * 2 + 1]);
            store_shared(shared_weights +
                             ScoreTile::offset(score_row + m * 16 + half * 8 + lane / 4, score_key / 8 + n) +
                             lane % 4 * 4,
                         pack(low, high, Input()));
          }

      Accumulators<kScoreRows, kScoreKeys> grad_logits;  // dP, then dS
      clear(grad_logits);
      multiply<Input, kHeadDim>(grad_logits, OperandA<RowTile>(shared_grad_output + stage, fresh(lane), score_row),
                                OperandB<KeyTile>(shared_value, fresh(lane), score_key));
#pragma unroll
      for (int m = 0; m < kScoreRows / 16; ++m)
#pragma unroll
        for (int n = 0; n < kScoreKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = grad_logits[m][n][e];
            x = s[m][n][e] * (ScorePolicy::kHasDelta ? x - delta[m * 2 + e / 2] : x);
          }
      store_accumulators<ScoreTile, Input>(shared_grad_logits, score_row, score_key, lane, grad_logits, 1);

      int* turn_of_rows = args.turns + row_tile;
      if (args.deterministic) {
        if (threadIdx.x == 0)
          wait_for_turn(turn_of_rows, tiles_before<kListed, kN>(args, band, row_begin, key_begin, tiles.entry(tile)));
      }
      __syncthreads();

      if (args.bias_sum || args.slope_sum) {
        // A row's sum over the warp's keys; one warp of a column of them adds to one place.
        const std::int64_t place = (row_tile * Tile::kScoreWarpsN + score_key / kScoreKeys) * kM + score_row + lane / 4;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int query = args.group.divide(row_begin + score_row + lane / 4 + row_of(r));
          const float distance = float(query + band.offset - (key_begin + score_key + lane % 4 * 2));
          float sum = 0, weighted = 0;
#pragma unroll
          for (int n = 0; n < kScoreKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float x = grad_logits[r / 2][n][r % 2 * 2 + e];
              sum += x;
              weighted = fmaf(x, fabsf(distance - float(n * 8 + e)), weighted);
            }
          sum = sum_of_quad(sum);
          weighted = sum_of_quad(weighted);
          if (lane % 4 == 0) {
            if (args.bias_sum) atomicAdd(args.bias_sum + place + row_of(r), sum);
            if (args.slope_sum) atomicAdd(args.slope_sum + place + row_of(r), -weighted);
          }
        }
      }

      multiply<Input, kM>(
          grad_values, TransposedA<ScoreTile>(shared_weights, fresh(lane), grad_key),
          TransposedB<RowTile, Tile::kKeyWarpsD>(shared_grad_output + stage, fresh(lane), grad_feature));
      {
        Accumulators<kQueryRows, kQueryFeatures> grad_query;
        clear(grad_query);
        multiply<Input, kN>(grad_query, OperandA<ScoreTile>(shared_grad_logits, fresh(lane), query_row),
                            TransposedB<KeyTile, Tile::kRowWarpsD>(shared_key, fresh(lane), query_feature));
        float* to = args.grad_query_sum + row_tile * (kM * kHeadDim) + threadIdx.x;
#pragma unroll
        for (int m = 0; m < kQueryRows / 16; ++m)
#pragma unroll
          for (int n = 0; n < kQueryFeatures / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              atomicAdd(to + ((m * (kQueryFeatures / 8) + n) * 4 + e) * kThreads, grad_query[m][n][e]);
      }
      if (args.deterministic) end_turn(turn_of_rows);

      multiply<Input, kM>(grad_keys, TransposedA<ScoreTile>(shared_grad_logits, fresh(lane), grad_key),
                          TransposedB<RowTile, Tile::kKeyWarpsD>(shared_query + stage, fresh(lane), grad_feature));
      if constexpr (kStages == 1) {
        __syncthreads();
        copy_rows(tile + 1);
      }
    }
    wait_copies<0>();
    __syncthreads();  // the last tile's readers, before the next head's copies and the results
  }

  store_accumulators<KeyTile, Input, Tile::kKeyWarpsD>(shared_key, grad_key, grad_feature, lane, grad_keys, args.scale);
  store_accumulators<KeyTile, Input, Tile::kKeyWarpsD>(shared_value, grad_key, grad_feature, lane, grad_values,
                                                       1 / ScorePolicy::kWeightScale);
  __syncthreads();
  const int thread = threadIdx.x;
  store_tile<kAligned, KeyTile, kN, kThreads>(shared_key, 0, key_rows(call.grad_key, static_cast<Input*>(nullptr)),
                                              key_begin, band.length_k, int(call.head_dim), thread);
  store_tile<kAligned, KeyTile, kN, kThreads>(shared_value, 0, key_rows(call.grad_value, static_cast<Input*>(nullptr)),
                                              key_begin, band.length_k, int(call.value_dim), thread);
}

// dQ from its sums: the registers of attnx_backward_sm80's threads, a block a tile of rows.
template <class Input, bool kAligned, class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attnx_grad_query_sm80(const __grid_constant__ BackwardArguments args) {
  using RowTile = SharedTile<Tile::kM, Tile::kHeadDim>;
  constexpr int kQueryRows = Tile::kM / Tile::kRowWarps, kQueryFeatures = Tile::kHeadDim / Tile::kRowWarpsD;
  extern __shared__ uint4 shared[];
  const std::uint32_t shared_rows = shared_address(shared);

  int block = blockIdx.x;
  const int query_block = args.query_blocks.split(block), batch = block % int(args.call.batch);
  const int head = block / int(args.call.batch);
  const Sequence sequence = args.sequence(batch);
  const int row_begin = query_block * Tile::kM, row_end = sequence.length_q * args.group.divisor();
  if (row_begin >= row_end) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t row_tile = head * args.row_tiles + args.row_tile(batch, sequence, query_block, Tile::kM);
  const float* from = args.grad_query_sum + row_tile * (Tile::kM * Tile::kHeadDim) + threadIdx.x;
  Accumulators<kQueryRows, kQueryFeatures> grad_query;
#pragma unroll
  for (int m = 0; m < kQueryRows / 16; ++m)
#pragma unroll
    for (int n = 0; n < kQueryFeatures / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) grad_query[m][n][e] = from[((m * (kQueryFeatures / 8) + n) * 4 + e) * Tile::kThreads];
  store_accumulators<RowTile, Input, Tile::kRowWarpsD>(shared_rows, warp % Tile::kRowWarps * kQueryRows,
                                                       warp / Tile::kRowWarps * 16, lane, grad_query, args.scale);
  __syncthreads();
  const Tensor& to = args.call.grad_query;
  const GroupedRows<Input> rows{rows_of<Input>(to, batch, args.query_head(head), sequence.first_q), to.row_stride,
                                to.head_stride, args.group};
  store_tile<kAligned, RowTile, Tile::kM, Tile::kThreads>(shared_rows, 0, rows, row_begin, row_end,
                                                          int(args.call.head_dim), threadIdx.x);
}

}  // namespace attnx::cuda
