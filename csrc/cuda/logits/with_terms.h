// These are the logits of calls that have a softcap, a mask, bounds of rows, numbers by key or dropout. One kernel
// serves all of them: each term is a branch that all threads take, or none does.
//
// A query head has tiles of rows of its own, so that the numbers by key are the same for all rows of a tile.
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/logits/kept_weights.h"
#include "cuda/logits/pair_mask.h"
#include "cuda/logits/row_bounds.h"
#include "cuda/logits/table_numbers.h"

namespace attnx::cuda {

// This is the logits policy, by what has a number for each pair.
template <class PairNumbers>
struct LogitsWithTerms {
  using Arguments = typename PairNumbers::Arguments;
  static Arguments arguments(const LogitScaling& scaling, const AttentionParams& p) {
    return PairNumbers::arguments({scaling, kernel_terms(p)}, p);
  }

  // Some calls list blocks of keys.
  static constexpr bool kHasLists = PairNumbers::kHasLists;
  static constexpr bool kPerHead = true;
  static constexpr bool kEveryTile = true;

  template <class Args>
  static __device__ __forceinline__ float result_factor(const Args& args) {
    return args.terms.dropout_factor;
  }

  // This is what a tile's logits leave to its weights. Where weights are normalised, key_mask counts in the logit.
  template <class Score, class Input, int kM, int kN>
  class Forward {
   protected:
    using Logits = float[kM][kN][4];
    float key_mask_[kN][2];  // of weights that are not normalised
    KeptWeights<kM, kN> kept_;

    // With a softcap this turns products into hyperbolic tangents. It returns what is left to multiply.
    template <class Args>
    static __device__ __forceinline__ float cap(Logits& s, const Args& args) {
      if (args.terms.softcap_log2 == 0) return args.scale_log2;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][n][e] = tanh_approx(s[m][n][e] * args.terms.scale_by_softcap);
      return args.terms.softcap_log2;
    }

    // This adds the rest to s * multiplier.
    template <class Args, class Place>
    __device__ __forceinline__ void add(Logits& s, float multiplier, const Args& args, const Place& place, int head,
                                        int row, int key, bool ragged) {
      const Band& band = place.sequence.band;
      const MaskEnds ends{max(place.sequence.length_q - 1, 0), max(band.length_k - 1, 0)};
      const bool inside = key / 8 * 8 + kN * 8 <= band.length_k;  // the same for all lanes

      float by_key[kN][2];
      const auto for_keys = [&](const PerKey& x, const auto& action) {
        if (!x.data) return;
        const float* numbers = static_cast<const float*>(x.data) + place.batch * x.batch_stride + head * x.head_stride +
                               place.sequence.first_k;
        const auto read = [&](const auto& place_of) {
#pragma unroll
          for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) action(n, e, __ldg(numbers + place_of(n * 8 + e)));
        };
        if (inside) {
          numbers += key;
          read([](int i) { return i; });
        } else {
          read([&](int i) { return min(key + i, ends.last_key); });
        }
      };
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          by_key[n][e] = 0;
          key_mask_[n][e] = 1;
        }
      for_keys(args.terms.key_bias, [&](int n, int e, float x) { by_key[n][e] = x * kLog2E; });
      for_keys(args.terms.key_mask, [&](int n, int e, float x) {
        if constexpr (Score::kNormalised) {
          by_key[n][e] += log2_approx(x);
        } else {
          // A key of 0 is hidden, and its weight is 0 without a multiplication.
          if (x == 0) by_key[n][e] = -INFINITY;
          if (x != 0) key_mask_[n][e] = x;
        }
      });
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][n][e] = fmaf(s[m][n][e], multiplier, by_key[n][e % 2]);

      PairNumbers::template add<Input>(s, args, place.batch, head, row, key, inside, ends);
      if (ragged) place_logits(s, args, band, head, row, key, 1);
      hide_outside_bounds(s, args.terms.row_bounds, place.batch, head, row, key, ends.last_row);

      if (args.terms.seed) {
        kept_.draw({std::uint64_t(__ldg(args.terms.seed)), std::uint32_t(__ldg(args.terms.offset))},
                   args.terms.bytes_kept, int(place.batch * args.heads_q) + head, row, key);
      } else {
        kept_.keep_all();
      }
    }

   public:
    template <class Args, class Place>
    __device__ __forceinline__ void place(Logits& s, const Args& args, const Place& place, int head, int row, int key,
                                          bool ragged) {
      add(s, cap(s, args), args, place, head, row, key, ragged);
    }

    __device__ __forceinline__ float weight(float weight, int n, int e) const {
      return Score::kNormalised ? weight : weight * key_mask_[n][e];
    }
    __device__ __forceinline__ std::uint32_t kept(std::uint32_t weights, int row, int n) const {
      return kept_.of_pair(weights, row, n);
    }
  };

  // The gradient of a product is that of its logit times 1 - tanh^2.
  template <class Score, class Input, int kM, int kN>
  class Backward : public Forward<Score, Input, kM, kN> {
    using Logits = float[kM][kN][4];
    Logits tangents_;  // the tangents, then the gradients of products

   public:
    template <class Args, class Place>
    __device__ __forceinline__ void place(Logits& s, const Args& args, const Place& place, int head, int row, int key,
                                          bool ragged) {
      const float multiplier = this->cap(s, args);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) tangents_[m][n][e] = args.terms.softcap_log2 == 0 ? 0 : s[m][n][e];
      this->add(s, multiplier, args, place, head, row, key, ragged);
    }

    template <class Args>
    __device__ __forceinline__ void drop(Logits& grad_weights, const Args& args) const {
      if (!args.terms.seed) return;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = grad_weights[m][n][e];
            x = this->kept_.of_one(x * args.terms.dropout_factor, m * 2 + e / 2, n, e % 2);
          }
    }

    __device__ __forceinline__ Logits& of_products(const Logits& of_logits) {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = tangents_[m][n][e];
            x = fmaf(-x * x, of_logits[m][n][e], of_logits[m][n][e]);
          }
      return tangents_;
    }
  };
};

struct WithTerms : LogitsWithTerms<MaskNumbers> {};
// The numbers of tables have kernels of their own, because they take registers that the others keep free.
struct WithTables : LogitsWithTerms<TableNumbers> {};

}  // namespace attnx::cuda
