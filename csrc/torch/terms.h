// These arguments say what is done to a logit, or added to it, besides biases and slopes; attnx::LogitTerms says how.
#pragma once

#include "arguments.h"

namespace attnx::ops {

struct Terms {
  std::optional<double> softcap;
  std::optional<StableTensor> key_bias, key_mask;
  double dropout_p;
  std::optional<StableTensor> seed, offset;
  ATTNX_FIELDS(softcap, key_bias, key_mask, dropout_p, seed, offset)
};

// These say which gradients a backward is asked for, as each costs time.
struct WantedTerms {
  bool key_bias_gradient, key_mask_gradient;
  ATTNX_FIELDS(key_bias_gradient, key_mask_gradient)
};
// They are empty where they are not wanted, and else like key_bias and key_mask.
struct TermGradients {
  StableTensor grad_key_bias, grad_key_mask;
  ATTNX_FIELDS(grad_key_bias, grad_key_mask)
};

// Sequences that are packed have no numbers of pairs, and no bounds of rows.
struct PairTerms {
  std::optional<StableTensor> attn_mask, distance_bias, row_bounds;
  ATTNX_FIELDS(attn_mask, distance_bias, row_bounds)
};
struct WantedPairTerms {
  bool attn_mask_gradient, distance_bias_gradient;
  ATTNX_FIELDS(attn_mask_gradient, distance_bias_gradient)
};
// They are empty where they are not wanted, and else like attn_mask and distance_bias, in the type of sums.
struct PairTermGradients {
  StableTensor grad_attn_mask, grad_distance_bias;
  ATTNX_FIELDS(grad_attn_mask, grad_distance_bias)
};
struct NoPairTerms {
  ATTNX_FIELDS()
};

// These are the terms of pairs, which of their gradients are wanted, and these gradients, for sequences of a layout.
template <class Layout>
struct PairTermsOf {
  using Terms = PairTerms;
  using Wanted = WantedPairTerms;
  using Gradients = PairTermGradients;
};
template <>
struct PairTermsOf<PackedWithPadding> {
  using Terms = NoPairTerms;
  using Wanted = NoPairTerms;
  using Gradients = NoPairTerms;
};

// The inputs are read before. Terms that the capability table does not name for the target's backend are refused.
void read_terms(const Target& target, const Terms& terms, AttentionParams& params);
void read_terms(const Target& target, const PairTerms& terms, AttentionParams& params);
inline void read_terms(const Target&, const NoPairTerms&, AttentionParams&) {}

// These allocate the gradients that are wanted and tell the kernel where they are.
TermGradients empty_gradients(const Target& target, const WantedTerms& wanted, const Terms& terms,
                              BackwardParams& params);
PairTermGradients empty_gradients(const Target& target, const WantedPairTerms& wanted, const PairTerms& terms,
                                  BackwardParams& params);
inline NoPairTerms empty_gradients(const Target&, const NoPairTerms&, const NoPairTerms&, BackwardParams&) {
  return {};
}

}  // namespace attnx::ops
