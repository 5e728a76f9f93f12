// Query, key and value have tangents, and so has what comes of them. With T = scale (dQ K^T + Q dK^T) and P' the
// derivative of a weight by its logit, the weights have the tangents dP = P' T, and
//
//     dO = dP V + P dV
//
// For softmax P' is P as long as its sum is not taken: then dL = sum_j P_j T_j is the tangent of the logsumexp, and
// dO = (P T) V + P dV - dL O. So one pass does: the sums of dO and of P T lie behind those of O in the accumulators,
// and the score rescales all of them alike.
//
// A number that all T of a row have in common moves the logsumexp alone; what it adds to (P T) V is subtracted again.
// So T is measured from a reference, its mean over the row's first tile of keys, and these sums stay small.
//
// A tangent that is null is zero. Its tiles are not copied, and its products are left out: their instructions issue
// under a predicate that is the same for all threads.
#pragma once

#include "cuda/common/reduce.h"
#include "cuda/common/tile.h"
#include "cuda/mainloop/forward_rows.h"

namespace attnx::cuda {

// This is the tangents policy.
struct GivenTangents {
  static constexpr bool kGiven = true;

  template <class Forward>
  struct Arguments : Forward {
    Tensor tangent_query, tangent_key, tangent_value, tangent_output, tangent_logsumexp;
  };

  template <class Score, class Input, class Tile, int kRows>
  using Rows = typename Score::template ForwardAlong<Input, kRows>;

  // These are O and dO, and for softmax eight parts of the sum of dP, by lane and by parity of the key.
  template <class Score>
  static constexpr int sums(int features) {
    return 2 * features + (Score::kNormalised ? 8 : 0);
  }

  template <class Score, class Storage, class Tile>
  class Block {
    using Input = typename Storage::Input;
    using QueryTile = SharedTile<Tile::kM, Tile::kHeadDim>;
    using KeyTile = SharedTile<Tile::kN, Tile::kHeadDim>;
    using KeyRows = StridedRows<const Input>;
    static constexpr int kRows = Tile::kWarpRows / 8, kBlocks = Tile::kHeadDim / 8;  // of features

    // A tangent's tile lies so many bytes behind the tile of what it is the tangent of.
    static constexpr int kBehind = Tile::kSharedBytes / 2;

    KeyRows keys_, values_;
    Accumulators<Tile::kWarpRows, Tile::kN> products_;  // T of a tile, without the scale
    float reference_[kRows] = {};

    template <class Args>
    static __device__ __forceinline__ bool moves_logits(const Args& args) {
      return args.tangent_query.data || args.tangent_key.data;
    }

   public:
    template <class Args, class Place>
    __device__ __forceinline__ Block(const Args& args, const Place& place) {
      const auto rows = [&](const Tensor& x) {
        return fresh(
            Storage::template key_rows<const Input>(x, place.batch, key_head_of(args, place.head), place.sequence));
      };
      keys_ = rows(args.tangent_key);
      values_ = rows(args.tangent_value);
    }

    template <class Args, class Place>
    __device__ __forceinline__ void load_query(const Args& args, std::uint32_t tile, const Place& place) const {
      if (!args.tangent_query.data) return;
      const auto rows = Storage::template query_rows<const Input>(args, args.tangent_query, place.batch,
                                                                  query_head_of(args, place.head), place.sequence);
      Storage::template load<QueryTile, Tile::kThreads>(tile + kBehind, rows, place.row_begin, place.row_end,
                                                        int(args.head_dim), {});
    }
    template <class Args>
    __device__ __forceinline__ void load_key(const Args& args, std::uint32_t tile, int key, int end) const {
      if (args.tangent_key.data)
        Storage::template load<KeyTile, Tile::kThreads>(tile + kBehind, keys_, key, end, int(args.head_dim), {});
    }
    template <class Args>
    __device__ __forceinline__ void load_value(const Args& args, std::uint32_t tile, int key, int end) const {
      if (args.tangent_value.data)
        Storage::template load<KeyTile, Tile::kThreads>(tile + kBehind, values_, key, end, int(args.value_dim), {});
    }

    // This makes S, and T from the same operands.
    template <class Args, class Queries, class Keys, int kM, int kN>
    __device__ __forceinline__ void multiply_keys(const Args& args, float (&s)[kM][kN][4], const Queries& queries,
                                                  const Keys& keys) {
      const bool of_query = args.tangent_query.data, of_key = args.tangent_key.data;
      clear(products_);
#pragma unroll
      for (int k = 0; k < Tile::kHeadDim; k += 16) {
        std::uint32_t query[kM][4], tangent_query[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          queries.load(query[m], m * 16, k);
          if (of_query) load_matrices(tangent_query[m], queries.at(m * 16, k) + kBehind);
        }
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
          std::uint32_t key[4], tangent_key[4];
          keys.load(key, n * 8, k);
          if (of_key) load_matrices(tangent_key, keys.at(n * 8, k) + kBehind);
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              multiply_add(s[m][n + i], query[m], key[i * 2], key[i * 2 + 1], Input());
              if (of_query) multiply_add(products_[m][n + i], tangent_query[m], key[i * 2], key[i * 2 + 1], Input());
              if (of_key)
                multiply_add(products_[m][n + i], query[m], tangent_key[i * 2], tangent_key[i * 2 + 1], Input());
            }
        }
      }
    }

    // The rows that have seen no key before this tile get their references from it.
    template <class Args, class Rows, int kM, int kN>
    __device__ __forceinline__ void begin(const Args& args, const float (&s)[kM][kN][4], const Rows& rows) {
      if constexpr (Score::kNormalised) {
        bool any = false;
#pragma unroll
        for (int r = 0; r < kRows; ++r) any |= rows.starts(r);
        if (!moves_logits(args) || !__any_sync(~0u, any)) return;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float sum = 0, count = 0;
#pragma unroll
          for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = r % 2 * 2; e < r % 2 * 2 + 2; ++e) {
              const bool visible = s[r / 2][n][e] != -INFINITY;
              sum += visible ? products_[r / 2][n][e] : 0;
              count += visible;
            }
          sum = sum_of_quad(sum);
          count = sum_of_quad(count);
          if (rows.starts(r) && count > 0) reference_[r] = sum * args.scale * reciprocal_approx(count);
        }
      }
    }

    template <class Args, class Rows, class Logits, class Values, int kM, int kN, int kD>
    __device__ __forceinline__ void multiply_values(const Args& args, float (&sums)[kM][kD][4], float (&s)[kM][kN][4],
                                                    Rows& rows, const Logits&, const Values& values) {
      const bool moves = moves_logits(args), of_value = args.tangent_value.data;
#pragma unroll
      for (int k = 0; k < kN; k += 2) {
        std::uint32_t weights[kM][4], tangents[kM][4];  // P and dP as operand A
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = m * 2 + i % 2;
            float weight[2], tangent[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int n = k + i / 2, at = i % 2 * 2 + e;
              float derivative;
              weight[e] = rows.weight(s[m][n][at], r, derivative);
              tangent[e] = derivative * fmaf(products_[m][n][at], args.scale, -reference_[r]);
              if constexpr (Score::kNormalised) sums[m][kBlocks * 2][at] += tangent[e];
            }
            weights[m][i] = pack(weight[0], weight[1], Input());
            tangents[m][i] = pack(tangent[0], tangent[1], Input());
          }
#pragma unroll
        for (int d = 0; d < kBlocks; d += 2) {
          std::uint32_t value[4], tangent_value[4];
          values.load(value, d * 8, k * 8);
          if (of_value) load_matrices_transposed(tangent_value, values.at(k * 8, d * 8) + kBehind);
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float (&along)[4] = sums[m][kBlocks + d + i];
              multiply_add(sums[m][d + i], weights[m], value[i * 2], value[i * 2 + 1], Input());
              if (moves) multiply_add(along, tangents[m], value[i * 2], value[i * 2 + 1], Input());
              if (of_value) multiply_add(along, weights[m], tangent_value[i * 2], tangent_value[i * 2 + 1], Input());
            }
        }
      }
    }

    // The row's tangent of the logsumexp takes the place of the first sum of dP.
    template <int kM, int kD>
    __device__ __forceinline__ void finish(int r, float (&sums)[kM][kD][4], float factor) const {
      const int at = r % 2 * 2;
      float moves = 0;
      if constexpr (Score::kNormalised) {
        float (&of_weights)[4] = sums[r / 2][kBlocks * 2];
        moves = sum_of_quad(of_weights[at] + of_weights[at + 1]) * factor;
        of_weights[at] = reference_[r] + moves;
      }
#pragma unroll
      for (int d = 0; d < kBlocks; ++d)
#pragma unroll
        for (int e = at; e < at + 2; ++e) {
          float& along = sums[r / 2][kBlocks + d][e];
          along = Score::kNormalised ? fmaf(-moves, sums[r / 2][d][e], along * factor) : along * factor;
        }
    }
  };
};

}  // namespace attnx::cuda
