// This is the backward mainloop for sm_80 (FlashAttention-2, Dao 2023): it makes dK and dV of a tile of keys, and the
// tile's part of dQ.
//
// A block owns a tile of keys and walks over the tiles of rows (query, head of the group) that see it. A step does
// this:
//
//   wait for Q and dO, all threads meet, copy the next ones | S = Q K^T | P to shared memory | dP = dO V^T
//   dS = derivative * (dP - delta) to shared memory, meet | dV += P^T dO | dQ += dS K, to global memory | dK += dS^T Q
//
// P and dS pass through shared memory, because the products that sum over rows want them transposed. dQ is summed in
// float32 by atomics, in the order of the threads' registers so that a warp's 32 sums lie in one line; a last pass
// scales them, rounds them and puts them in place. A deterministic backward adds in the order of the tiles of keys:
// each block waits for its turn, and it cannot wait for ever, because blocks start in the same order.
//
// A pointwise score has no delta, so it needs no pass over dO and O.
#pragma once

#include "cuda/common/logits.h"
#include "cuda/common/reduce.h"
#include "cuda/mainloop/backward_rows.h"

namespace attnx::cuda {

// This tells the next block of keys that this one has added to a tile of rows.
__device__ __forceinline__ void end_turn(int* turns) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(turns, 1);
}

template <class Score, class Tiles, class Storage, class Tile, class Logits>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attnx_backward_sm80(const __grid_constant__ BackwardArguments<Tiles, Storage, Logits> args) {
  using Input = typename Storage::Input;
  constexpr int kM = Tile::kM, kN = Tile::kN, kHeadDim = Tile::kHeadDim;
  constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages;
  using RowTile = SharedTile<kM, kHeadDim>;
  using KeyTile = SharedTile<kN, kHeadDim>;
  using ScoreTile = SharedTile<kM, kN>;
  using ScorePolicy = typename Score::template Backward<Input>;

  extern __shared__ uint4 shared[];
  const std::uint32_t shared_key = shared_address(shared);
  const std::uint32_t shared_value = shared_key + KeyTile::kBytes;
  const std::uint32_t shared_query = shared_value + KeyTile::kBytes;
  const std::uint32_t shared_grad_output = shared_query + kStages * RowTile::kBytes;
  const std::uint32_t shared_weights = shared_grad_output + kStages * RowTile::kBytes;
  const std::uint32_t shared_grad_logits = shared_weights + ScoreTile::kBytes;

  const auto& tensors = args.tensors;
  using Place = typename KeyPlaceOf<Tiles>::Type;
  const Place place = Place::of(args, blockIdx.x, Tile());
  const auto& [key_begin, head, batch, sequence] = place;
  const auto& band = sequence.band;
  if (key_begin >= band.length_k) return;
  const int row_end = sequence.length_q * args.group.divisor();

  const auto key_rows = [&]<class Element>(const auto& x, Element*) {
    return Storage::template key_rows<Element>(x, batch, head, sequence);
  };
  {
    const auto keys = key_rows(tensors.key, static_cast<const Input*>(nullptr));
    const typename Storage::template Ahead<KeyTile, kThreads> ahead(keys, key_begin, band.length_k);
    Storage::template load<KeyTile, kThreads>(shared_key, keys, key_begin, band.length_k, int(args.head_dim), ahead);
    Storage::template load<KeyTile, kThreads>(shared_value, key_rows(tensors.value, static_cast<const Input*>(nullptr)),
                                              key_begin, band.length_k, int(args.value_dim), ahead);
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kScoreRows = kM / Tile::kScoreWarps, kScoreKeys = kN / Tile::kScoreWarpsN;
  constexpr int kGradKeys = kN / Tile::kKeyWarps, kGradFeatures = kHeadDim / Tile::kKeyWarpsD;
  constexpr int kQueryRows = kM / Tile::kRowWarps, kQueryFeatures = kHeadDim / Tile::kRowWarpsD;
  static_assert(kScoreRows % 16 == 0 && kScoreKeys % 16 == 0 && kGradKeys % 16 == 0 && kGradFeatures % 16 == 0 &&
                kQueryRows % 16 == 0 && kQueryFeatures % 16 == 0);
  const int score_row = warp % Tile::kScoreWarps * kScoreRows, score_key = warp / Tile::kScoreWarps * kScoreKeys;
  const int grad_key = warp % Tile::kKeyWarps * kGradKeys, grad_feature = warp / Tile::kKeyWarps * 16;
  const int query_row = warp % Tile::kRowWarps * kQueryRows, query_feature = warp / Tile::kRowWarps * 16;
  constexpr int kRows = kScoreRows / 8;  // rows of S that a thread has a part of

  Accumulators<kGradKeys, kGradFeatures> grad_keys, grad_values;
  clear(grad_keys);
  clear(grad_values);
  float divisor = 1;  // of grad_values so far

  // Either each query head of the group has its own tiles of rows, or one tile holds rows of all of them. A place has
  // one query head.
  constexpr bool kPerHead = Tiles::kPerHead || Logits::kPerHead;
  const int turns = kPerHead && !Tiles::kHasPlaces ? int(args.heads_q / args.heads_k) : 1;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int query_head = kPerHead ? head * turns + turn : query_head_of(args, head);
    const auto tiles = Tiles::template rows<Tile>(args, sequence, batch, query_head, key_begin);
    const int begin = tiles.begin(), end = tiles.end();
    const auto rows = [&](const auto& x) {
      return Storage::template query_rows<const Input>(args, x, batch, query_head, sequence);
    };
    // Rows of queries and output gradients lie alike.
    typename Storage::template Ahead<RowTile, kThreads> ahead;
    const auto read_ahead = [&](int tile) {
      if (tile < end) ahead = {rows(tensors.query), tiles.first(tile), row_end};
    };
    const auto copy_rows = [&](int tile) {
      if (tile < end) {
        const int row = tiles.first(tile), stage = tile % kStages * RowTile::kBytes;
        Storage::template load<RowTile, kThreads>(shared_query + stage, rows(tensors.query), row, row_end,
                                                  int(args.head_dim), ahead);
        Storage::template load<RowTile, kThreads>(shared_grad_output + stage, rows(tensors.grad_output), row, row_end,
                                                  int(args.value_dim), ahead);
      }
      commit_copies();
    };
    read_ahead(begin);
    copy_rows(begin);
    if constexpr (kStages == 2) read_ahead(begin + 1);

#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      const int stage = tile % kStages * RowTile::kBytes;
      wait_copies<0>();
      __syncthreads();
      if constexpr (kStages == 2) copy_rows(tile + 1);

      const int row_begin = tiles.first(tile);
      std::int64_t row_tile;
      if constexpr (Tiles::kHasPlaces) {
        row_tile = sequence.first_row_tile + row_begin / kM;
      } else {
        row_tile =
            (kPerHead ? query_head : head) * args.row_tiles + row_tile_of(args, batch, sequence, row_begin / kM, kM);
      }
      float offset[kRows], delta[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t row = row_tile * kM + score_row + lane / 4 + row_of(r);
        offset[r] = __ldg(args.offset + row) + (Tiles::kHasBias ? tiles.bias(tile) * kLog2E : 0.0f);
        delta[r] = Score::kNormalised ? __ldg(args.delta + row) : 0;
      }
      // Some scores need more of a row than its offset.
      const auto row_of_score = [&](int r) {
        if constexpr (ScorePolicy::kHasRows) {
          return ScorePolicy::row(args, row_tile * kM + score_row + lane / 4 + row_of(r), offset[r]);
        } else {
          return offset[r];
        }
      };

      // S is computed first, and then becomes what dP - delta is multiplied with.
      Accumulators<kScoreRows, kScoreKeys> s;
      clear(s);
      multiply<Input, kHeadDim>(s, OperandA<RowTile>(shared_query + stage, fresh(lane), score_row),
                                OperandB<KeyTile>(shared_key, fresh(lane), score_key));
      const Visible plain =
          band.seen_by_all(args.group.divide(row_begin), args.group.divide(min(row_begin + kM, row_end) - 1));
      typename Logits::template Backward<Score, Input, kScoreRows / 16, kScoreKeys / 8> logits;
      float multiplier = args.scale_log2;
      const bool ragged = key_begin < plain.first || key_begin + kN > plain.end || args.alibi_slopes.data;
      if (Logits::kEveryTile || ragged) {
        logits.place(s, args, place, query_head, row_begin + score_row + fresh(lane) / 4,
                     key_begin + score_key + fresh(lane) % 4 * 2, ragged);
        multiplier = 1;
      }
#pragma unroll
      for (int m = 0; m < kScoreRows / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto own = row_of_score(m * 2 + half);
#pragma unroll
          for (int n = 0; n < kScoreKeys / 8; ++n) {
            float (&pair)[4] = s[m][n];
            const auto weight = [&](int e) {
              float& x = pair[half * 2 + e];
              float weight;
              if constexpr (ScorePolicy::kHasRows) {
                weight = ScorePolicy::weight(x * multiplier, own, x);
              } else {
                weight = ScorePolicy::weight(fmaf(x, multiplier, own), x);
              }
              x = logits.weight(x, n, e);
              return logits.weight(weight, n, e);
            };
            const float low = weight(0), high = weight(1);
            store_shared(shared_weights +
                             ScoreTile::offset(score_row + m * 16 + half * 8 + lane / 4, score_key / 8 + n) +
                             lane % 4 * 4,
                         logits.kept(pack(low, high, Input()), m * 2 + half, n));
          }
        }

      if constexpr (kDivided<Score, Tiles>) {
        const float own_divisor = tiles.divisor(tile);
        if (own_divisor != divisor) scale(grad_values, own_divisor / divisor);
        if (own_divisor != 1) scale(s, 1 / own_divisor);
        divisor = own_divisor;
      }

      Accumulators<kScoreRows, kScoreKeys> grad_logits;  // dP, then dS
      clear(grad_logits);
      multiply<Input, kHeadDim>(grad_logits, OperandA<RowTile>(shared_grad_output + stage, fresh(lane), score_row),
                                OperandB<KeyTile>(shared_value, fresh(lane), score_key));
      logits.drop(grad_logits, args);
#pragma unroll
      for (int m = 0; m < kScoreRows / 16; ++m) {
        const decltype(row_of_score(0)) own[] = {row_of_score(m * 2), row_of_score(m * 2 + 1)};
#pragma unroll
        for (int n = 0; n < kScoreKeys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = grad_logits[m][n][e];
            if (Score::kNormalised) x -= delta[m * 2 + e / 2];
            if constexpr (ScorePolicy::kHasRows) {
              x = ScorePolicy::gradient(s[m][n][e], x, own[e / 2]);
            } else {
              x *= s[m][n][e];
            }
          }
      }
      store_accumulators<ScoreTile, Input>(shared_grad_logits, score_row, score_key, lane,
                                           logits.of_products(grad_logits), 1);

      int* turn_of_rows = args.turns + row_tile;
      if (args.deterministic) {
        if (threadIdx.x == 0)
          wait_for_turn(turn_of_rows, Tiles::template before<kN>(args, band, row_begin, key_begin, tiles, tile));
      }
      __syncthreads();

      if (!Tiles::kHasPlaces && (args.bias_sum || args.slope_sum)) {  // clusters have neither
        // This sums each row over the warp's keys. Of the warps that share those keys, only one adds to a given place.
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

      read_ahead(tile + kStages);
      multiply<Input, kM>(grad_keys, TransposedA<ScoreTile>(shared_grad_logits, fresh(lane), grad_key),
                          TransposedB<RowTile, Tile::kKeyWarpsD>(shared_query + stage, fresh(lane), grad_feature));
      if constexpr (kStages == 1) {
        __syncthreads();
        copy_rows(tile + 1);
      }
    }
    wait_copies<0>();
    __syncthreads();  // all have read the last tile before the next head's copies and the results
  }

  const auto store_grad = [&](std::uint32_t tile, auto& sums, float factor, std::int64_t features, const auto& addend) {
    if constexpr (Tiles::kHasAddend) {
      if (const Tensor& from = addend(args.tiles); from.data) {
        add_rows<false, Tile::kKeyWarpsD>(sums, factor, key_rows(from, static_cast<const float*>(nullptr)),
                                          key_begin + grad_key, band.length_k, grad_feature, int(features), lane);
        factor = 1;
      }
    }
    store_accumulators<KeyTile, Input, Tile::kKeyWarpsD>(tile, grad_key, grad_feature, lane, sums, factor);
  };
  store_grad(shared_key, grad_keys, args.scale, args.head_dim,
             [](const auto& x) -> const Tensor& { return x.grad_key_addend; });
  store_grad(shared_value, grad_values, Logits::result_factor(args) / (ScorePolicy::kWeightScale * divisor),
             args.value_dim, [](const auto& x) -> const Tensor& { return x.grad_value_addend; });
  __syncthreads();
  const int thread = threadIdx.x;
  // A place that is read from memory is read again here, because keeping it through the loop would cost registers.
  const Place own = Place::of(args, Tiles::kHasPlaces ? fresh(blockIdx.x) : int(blockIdx.x), Tile());
  const auto store = [&](std::uint32_t tile, const auto& x, std::int64_t features) {
    Storage::template store<KeyTile, kN, kThreads>(
        tile, 0, Storage::template key_rows<Input>(x, own.batch, own.head, own.sequence), own.key_begin,
        own.sequence.band.length_k, int(features), thread);
  };
  store(shared_key, tensors.grad_key, args.head_dim);
  store(shared_value, tensors.grad_value, args.value_dim);
}

}  // namespace attnx::cuda
