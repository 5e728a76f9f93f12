// This is what kernels are told of the terms of logits.
#pragma once

#include "attnx/dropout.h"
#include "cuda/common/geometry.h"

namespace attnx::cuda {

struct KernelTerms {
  float softcap_log2;      // the softcap, times log2(e); 0: none
  float scale_by_softcap;  // the scale over the softcap
  PairMask attn_mask;
  bool mask_in_pairs;  // whether the numbers of two keys, the first one even, lie together and on their size
  RowBounds row_bounds;
  PerKey key_bias, key_mask;
  const std::int64_t *seed, *offset;  // of dropout; null: none
  std::uint32_t bytes_kept;
  float dropout_factor;  // what a kept weight counts; 1 without dropout
};

struct LogitTermsArguments : LogitScaling {
  KernelTerms terms;
};

// This tells whether logits have terms, for which loops have a policy of their own.
inline bool has_terms(const AttentionParams& p) { return p.terms.any() || p.row_bounds.data; }

inline KernelTerms kernel_terms(const AttentionParams& p) {
  const LogitTerms& terms = p.terms;
  const PairMask& mask = terms.attn_mask;
  const std::int64_t size = mask.kind == MaskKind::kBool ? 1 : mask.kind == MaskKind::kInput ? 2 : 4;
  const bool in_pairs = mask.key_stride == 1 && reinterpret_cast<std::intptr_t>(mask.data) % (2 * size) == 0 &&
                        mask.batch_stride % 2 == 0 && mask.head_stride % 2 == 0 && mask.row_stride % 2 == 0;
  KernelTerms args{};
  args.softcap_log2 = float(terms.softcap * 1.4426950408889634);
  if (terms.softcap != 0) args.scale_by_softcap = float(p.scale / terms.softcap);
  args.attn_mask = mask;
  args.mask_in_pairs = in_pairs;
  args.row_bounds = p.row_bounds;
  args.key_bias = terms.key_bias;
  args.key_mask = terms.key_mask;
  args.dropout_factor = 1;
  if (terms.dropout != 0) {
    args.seed = terms.seed;
    args.offset = terms.offset;
    args.bytes_kept = dropout_bytes_kept(terms.dropout);
    args.dropout_factor = float(dropout_factor(args.bytes_kept));
  }
  return args;
}

}  // namespace attnx::cuda
