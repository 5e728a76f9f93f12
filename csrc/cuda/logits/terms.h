// This is what kernels are told of the terms of logits: masks, numbers by key, softcap and dropout.
#pragma once

#include "cuda/common/geometry.h"

namespace attnx::cuda {

struct LogitTermsArguments : LogitScaling {
  float softcap_log2;    // the softcap, times log2(e); 0: none
  float scale_by_softcap;  // the scale over the softcap
  PairMask attn_mask;
  bool mask_in_pairs;  // whether the numbers of two keys, the first one even, lie together and on their size
  PerKey key_bias, key_mask;
};

inline LogitTermsArguments terms_arguments(const LogitScaling& scaling, const AttentionParams& p) {
  const LogitTerms& terms = p.terms;
  const PairMask& mask = terms.attn_mask;
  const std::size_t size = mask.kind == MaskKind::kBool ? 1 : mask.kind == MaskKind::kInput ? 2 : 4;
  const bool in_pairs = mask.key_stride == 1 && reinterpret_cast<std::uintptr_t>(mask.data) % (2 * size) == 0 && mask.batch_stride % 2 == 0 && mask.head_stride % 2 == 0 && mask.row_stride % 2 == 0;
  const double softcap = terms.softcap;
  return {scaling, float(softcap * 1.4426950408889634), softcap == 0 ? 0 : float(p.scale / softcap), mask, in_pairs, terms.key_bias, terms.key_mask};
}

}  // namespace attnx::cuda
