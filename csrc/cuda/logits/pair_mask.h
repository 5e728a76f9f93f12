// This applies attn_mask, which has a number for each pair of a query and a key, to a tile of logits.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/common/logits.h"
#include "cuda/logits/terms.h"

namespace attnx::cuda {

// These say what a number does to a logit, which is times log2(e).
struct HidingMask {
  using Number = std::uint8_t;
  static __device__ __forceinline__ float apply(float logit, Number seen) { return seen ? logit : -INFINITY; }
};
template <class Number_>
struct AddedMask {
  using Number = Number_;
  static __device__ __forceinline__ float apply(float logit, Number added) { return fmaf(float(added), kLog2E, logit); }
};

// This reads the numbers of two neighbouring keys, which lie on their size.
template <class Number>
__device__ __forceinline__ void load_pair(Number (&to)[2], const Number* from) {
  using Word = std::conditional_t<sizeof(Number) == 1, std::uint16_t,
                                  std::conditional_t<sizeof(Number) == 2, std::uint32_t, uint2>>;
  const Word word = __ldg(reinterpret_cast<const Word*>(from));
  std::memcpy(to, &word, sizeof word);
}

// The rows and keys of a mask end with these. What lies past them is hidden by the band, so any number serves it.
struct MaskEnds {
  int last_row, last_key;
};

// `of_head` is the first number of a query head; row and key are the thread's first.
template <class Mask, bool kPairs, int kM, int kN>
__device__ __forceinline__ void apply_mask(float (&s)[kM][kN][4], const PairMask& mask,
                                           const typename Mask::Number* of_head, int row, int key, MaskEnds ends) {
  const typename Mask::Number* at[kM * 2];
  int own = kPairs ? key : min(key, ends.last_key);
#pragma unroll
  for (int r = 0; r < kM * 2; ++r)
    at[r] = of_head + min(row + row_of(r), ends.last_row) * mask.row_stride + own * (kPairs ? 1 : mask.key_stride);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    typename Mask::Number numbers[kM * 2][2];
    if constexpr (kPairs) {
#pragma unroll
      for (int r = 0; r < kM * 2; ++r) load_pair(numbers[r], at[r] + n * 8);
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int next = min(key + n * 8 + (e ? 8 : 1), ends.last_key);
        const std::int64_t step = (next - own) * mask.key_stride;
        own = next;
#pragma unroll
        for (int r = 0; r < kM * 2; ++r) {
          numbers[r][e] = __ldg(at[r]);
          at[r] += step;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kM * 2; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[r / 2][n][r % 2 * 2 + e];
        x = Mask::apply(x, numbers[r][e]);
      }
  }
}

// This is the policy of the numbers of pairs that attn_mask has.
struct MaskNumbers {
  using Arguments = LogitTermsArguments;
  static Arguments arguments(const LogitTermsArguments& terms, const AttentionParams&) { return terms; }
  static constexpr bool kHasLists = true;

  // Input is the type of the call's queries. All keys of the thread are `inside` where none is past the last one.
  template <class Input, class Args, int kM, int kN>
  static __device__ __forceinline__ void add(float (&s)[kM][kN][4], const Args& args, int batch, int head, int row,
                                             int key, bool inside, MaskEnds ends) {
    const PairMask& mask = args.terms.attn_mask;
    const auto apply = [&]<class Mask>(Mask) {
      const auto* of_head =
          static_cast<const typename Mask::Number*>(mask.data) + batch * mask.batch_stride + head * mask.head_stride;
      if (inside && args.terms.mask_in_pairs) {
        apply_mask<Mask, true>(s, mask, of_head, row, key, ends);
      } else {
        apply_mask<Mask, false>(s, mask, of_head, row, key, ends);
      }
    };
    if (mask.kind == MaskKind::kBool) apply(HidingMask());
    if (mask.kind == MaskKind::kInput) apply(AddedMask<Input>());
    if (mask.kind == MaskKind::kSum) apply(AddedMask<float>());
  }
};

}  // namespace attnx::cuda
