// This is the forward mainloop for sm_80: it uses mma.sync on tiles that cp.async brings to shared memory
// (FlashAttention-2, Dao 2023).
//
// A block owns a tile of rows (query, head of the group) and walks over the tiles of keys. A step does this:
//
//   wait for K, all threads meet | copy the V of this step | S = Q K^T | wait for V, meet | copy the next K |
//   place logits, if the tile is not whole | score | O += P V
//
// V's copy thus runs under the first product, and the next K's under the score and the second product. With two stages
// each copy starts one step earlier. A thread's weights are made, packed and multiplied 16 keys at a time: P stays in
// the registers of S, and the special functions of one chunk run beside the products of the one before.
#pragma once

#include <type_traits>

#include "cuda/common/tile.h"
#include "cuda/mainloop/forward_rows.h"
#include "cuda/tangents/none.h"

namespace attnx::cuda {

// This says which tile of rows a block owns.
template <class Tiles, class Args, class Tile>
__device__ __forceinline__ auto place_of(const Args& args, int block, Tile tile) {
  if constexpr (Tiles::kHasPlaces) {
    return Tiles::Place::of(args, block, tile);
  } else {
    return ForwardPlace::of(args, block, tile);
  }
}

template <class Score, class Tiles, class Storage, class Tile, class Logits, class Tangents = NoTangents>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    attnx_forward_sm80(const __grid_constant__
                       typename Tangents::template Arguments<ForwardArguments<Score, Tiles, Storage, Logits>>
                           args) {
  using Input = typename Storage::Input;
  using QueryTile = SharedTile<Tile::kM, Tile::kHeadDim>;
  using KeyTile = SharedTile<Tile::kN, Tile::kHeadDim>;
  constexpr int kThreads = Tile::kThreads, kStages = Tile::kStages, kN = Tile::kN, kHeadDim = Tile::kHeadDim;
  constexpr int kRows = Tile::kWarpRows / 8;  // rows that a thread has a part of

  extern __shared__ uint4 shared[];
  const std::uint32_t shared_query = shared_address(shared);
  const std::uint32_t shared_key = shared_query + QueryTile::kBytes;
  const std::uint32_t shared_value = shared_key + kStages * KeyTile::kBytes;

  const auto& tensors = args.tensors;
  const auto place = place_of<Tiles>(args, blockIdx.x, Tile());
  const auto& [split, query_block, head, batch, sequence, row_begin, row_end] = place;
  if (row_begin >= row_end) return;
  const auto& band = sequence.band;
  const int first_query = args.group.divide(row_begin);
  const int last_query = args.group.divide(min(row_begin + Tile::kM, row_end) - 1);

  const auto tiles = Tiles::template keys<Tile>(args, place);
  const int begin = tiles.begin(), end = tiles.end();

  const auto key_rows = [&](const auto& x) {
    return fresh(Storage::template key_rows<const Input>(x, batch, key_head_of(args, head), sequence));
  };
  const auto keys = key_rows(tensors.key);
  const auto values = key_rows(tensors.value);

  typename Tangents::template Block<Score, Storage, Tile> tangents(args, place);

  // Rows of keys and values lie alike, and what tells where is read before the copies of a tile start.
  typename Storage::template Ahead<KeyTile, kThreads> ahead;
  const auto read_ahead = [&](int tile, int key) {
    if (tile < end) ahead = {keys, key, band.length_k};
  };
  // A copy past the last tile is an empty group, which keeps the count of groups the same in every step.
  const auto copy_key = [&](int tile, int key) {
    if (tile < end) {
      Storage::template load<KeyTile, kThreads>(shared_key + tile % kStages * KeyTile::kBytes, keys, key, band.length_k,
                                                int(args.head_dim), ahead);
      tangents.load_key(args, shared_key + tile % kStages * KeyTile::kBytes, key, band.length_k);
    }
    commit_copies();
  };
  const auto copy_value = [&](int tile, int key) {
    if (tile < end) {
      Storage::template load<KeyTile, kThreads>(shared_value + tile % kStages * KeyTile::kBytes, values, key,
                                                band.length_k, int(args.value_dim), ahead);
      tangents.load_value(args, shared_value + tile % kStages * KeyTile::kBytes, key, band.length_k);
    }
    commit_copies();
  };
  // These are the first keys of this tile and the next ones. Where they come from memory, they are read well before
  // they are needed.
  int first_keys[kStages + 1] = {};
  const auto key_of = [&](int tile) { return tile < end ? tiles.first(tile) : 0; };
  const auto key_ahead = [&](int tile, int ahead) {
    if constexpr (Tiles::kFromMemory) return first_keys[ahead];
    return tiles.first(tile + ahead);
  };
  if constexpr (Tiles::kFromMemory) {
#pragma unroll
    for (int i = 0; i <= kStages; ++i) first_keys[i] = key_of(begin + i);
  }

  const auto query_rows = [&]<class Element>(const auto& place, const auto& x, Element*) {
    return Storage::template query_rows<Element>(args, x, place.batch, query_head_of(args, place.head), place.sequence);
  };
  const auto queries = query_rows(place, tensors.query, static_cast<const Input*>(nullptr));
  read_ahead(begin, key_ahead(begin, 0));
  Storage::template load<QueryTile, kThreads>(
      shared_query, queries, row_begin, row_end, int(args.head_dim),
      typename Storage::template Ahead<QueryTile, kThreads>(queries, row_begin, row_end));
  tangents.load_query(args, shared_query, place);
  copy_key(begin, key_ahead(begin, 0));
  if constexpr (kStages == 2) {
    copy_value(begin, key_ahead(begin, 0));
    read_ahead(begin + 1, key_ahead(begin, 1));
    copy_key(begin + 1, key_ahead(begin, 1));
  }

  const auto lane_now = [] { return fresh(threadIdx.x) % 32; };
  const auto warp_row_now = [] { return fresh(threadIdx.x) / 32 * Tile::kWarpRows; };  // row within the tile
  typename Tangents::template Rows<Score, Input, Tile, kRows> score;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = min(row_begin + warp_row_now() + lane_now() / 4 + row_of(r), row_end - 1),
              query = args.group.divide(row);
    const int query_head = query_head_of(args, head) + row - query * args.group.divisor();
    if constexpr (requires { score.read_row(r, args.score, batch, sequence, query_head, query); }) {
      score.read_row(r, args.score, batch, sequence, query_head, query);
    } else {
      score.set_row(r, args.score, band, query_head, query, split);
    }
  }
  // For all rows, the logits of these keys are a positive multiple of the products.
  Visible plain = band.seen_by_all(first_query, last_query);
  if (args.alibi_slopes.data || !(args.scale_log2 > 0)) plain.end = -1;

  Accumulators<Tile::kWarpRows, Tangents::template sums<Score>(kHeadDim)> output;
  clear(output);

#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    const int stage = tile % kStages;
    wait_copies<2 * (kStages - 1)>();
    __syncthreads();
    copy_value(tile + kStages - 1, key_ahead(tile, kStages - 1));
    read_ahead(tile + kStages, key_ahead(tile, kStages));

    Accumulators<Tile::kWarpRows, kN> s;
    clear(s);
    tangents.multiply_keys(args, s, OperandA<QueryTile>(shared_query, lane_now(), warp_row_now()),
                           OperandB<KeyTile>(shared_key + stage * KeyTile::kBytes, lane_now()));

    wait_copies<2 * (kStages - 1)>();
    __syncthreads();
    copy_key(tile + kStages, key_ahead(tile, kStages));

    typename Logits::template Forward<Score, Input, kRows / 2, kN / 8> logits;
    float multiplier = args.scale_log2;
    const int key = key_ahead(tile, 0);
    const bool ragged = key < plain.first || key + kN > plain.end;
    if (Logits::kEveryTile || ragged) {
      const auto again = place_of<Tiles>(args, fresh(blockIdx.x), Tile());
      logits.place(s, args, again, query_head_of(args, again.head), again.row_begin + warp_row_now() + lane_now() / 4,
                   key + lane_now() % 4 * 2, ragged);
      multiplier = 1;
    }
    tangents.begin(args, s, score);
    score.template begin<Tiles::kHasBias>(s, output, multiplier, tiles.bias(tile) * kLog2E, tiles.divisor(tile));
    if constexpr (requires { score.weighs(s); })
      if (!score.weighs(s)) continue;  // of a band, whose tiles do not come from memory
    tangents.multiply_values(args, output, s, score, logits,
                             TransposedB<KeyTile>(shared_value + stage * KeyTile::kBytes, lane_now()));

    if constexpr (Tiles::kFromMemory) {
#pragma unroll
      for (int i = 0; i < kStages; ++i) first_keys[i] = first_keys[i + 1];
      first_keys[kStages] = key_of(tile + kStages + 1);
    }
  }
  wait_copies<0>();

  const int lane = lane_now(), warp_row = warp_row_now();
  float logsumexp[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float factor = score.finish(r) * Logits::result_factor(args);
    logsumexp[r] = score.logsumexp(r);
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
      output[r / 2][d][r % 2 * 2] *= factor;
      output[r / 2][d][r % 2 * 2 + 1] *= factor;
    }
    tangents.finish(r, output, factor);
  }

  // The place is found again here, because keeping it through the loop would cost registers.
  const auto own = place_of<Tiles>(args, fresh(blockIdx.x), Tile());
  const int thread_row = own.row_begin + warp_row + lane / 4;
  if constexpr (!Tiles::kHasPlaces && !Tangents::kGiven) {  // clusters and tangents are not split
    if (args.splits.divisor() > 1) {
      store_partial<Score::kNormalised, Tile::kM>(output, logsumexp, args, args.partial, own, thread_row, lane);
      return;
    }
  }

  // The output goes through the warp's own rows of the query's tile, which no one else reads any more, so that stores
  // can be 16 bytes wide. Where there was no tile of keys, other threads' copies of the query have only now ended.
  __syncthreads();
  const auto store_rows = [&]<int kFirst>(std::integral_constant<int, kFirst>, const Tensor& to) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d)
        store_shared(shared_query + QueryTile::offset(warp_row + lane / 4 + row_of(r), d) + lane % 4 * 4,
                     pack(output[r / 2][kFirst + d][r % 2 * 2], output[r / 2][kFirst + d][r % 2 * 2 + 1], Input()));
    }
    __syncwarp();
    Storage::template store<QueryTile, Tile::kWarpRows, 32>(
        shared_query, warp_row, query_rows(own, to, static_cast<Input*>(nullptr)), own.row_begin + warp_row,
        own.row_end, int(args.value_dim), lane);
  };
  const auto store_numbers = [&](const Tensor& to, const auto& number) {
    if (to.data && lane % 4 == 0) {
      const auto rows = query_rows(own, to, static_cast<float*>(nullptr));
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (thread_row + row_of(r) < own.row_end) *rows.at(thread_row + row_of(r)) = number(r);
    }
  };
  store_rows(std::integral_constant<int, 0>(), tensors.output);
  store_numbers(args.logsumexp, [&](int r) { return logsumexp[r]; });
  if constexpr (Tangents::kGiven) {
    __syncwarp();
    store_rows(std::integral_constant<int, kHeadDim / 8>(), args.tangent_output);
    if constexpr (Score::kNormalised)
      store_numbers(args.tangent_logsumexp, [&](int r) { return output[r / 2][kHeadDim / 4][r % 2 * 2]; });
  }
}

}  // namespace attnx::cuda
