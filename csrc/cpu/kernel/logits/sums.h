// Gradients of the terms that several rows share: sums over the rows of a unit, then over units, and in the end over
// sequences and heads that share a number, always in the same order.
#pragma once

#include "../arena.h"
#include "../units.h"
#include "attnx/params.h"

namespace attnx::cpu::ATTNX_ISA {

// Whether rows share what is added, so that its gradient is a sum over rows.
inline bool sums_added(const BackwardParams& p) {
  return p.grad_key_bias.data || (p.grad_attn_mask.data && p.grad_attn_mask.row_stride == 0);
}
inline bool sums_shares(const BackwardParams& p) { return p.grad_key_mask.data; }

// Whether units of different heads add to the same rows of the gradient of a mask.
inline bool heads_share_rows(const BackwardParams& p) {
  const PairMask& grad = p.grad_attn_mask;
  if (!grad.data || grad.row_stride == 0) return false;
  return (grad.batch_stride == 0 && p.batch > 1) || (grad.head_stride == 0 && p.heads_q > 1);
}

// What a unit sums over its rows, [group][keys].
struct TermSums {
  double *added, *shares;
  std::int64_t keys;

  template <class Sizes>
  TermSums(const Sizes& sizes, Arena& arena)
      : added(sizes.sums_added ? arena.take<double>(sizes.group * sizes.keys) : nullptr),
        shares(sizes.sums_shares ? arena.take<double>(sizes.group * sizes.keys) : nullptr),
        keys(sizes.keys) {}
};

// The sums of all heads, [batch][heads_q][keys].
struct AllTermSums {
  double *added, *shares;
  std::int64_t bytes;

  AllTermSums(const BackwardParams& p, char* block) {
    Arena arena(block);
    const std::int64_t all = p.batch * p.heads_q * p.length_k;
    added = sums_added(p) ? arena.take<double>(all) : nullptr;
    shares = sums_shares(p) ? arena.take<double>(all) : nullptr;
    bytes = arena.used();
  }
};

// It adds up the sums of the splits of a key head, of_split(0), of_split(1), ..., for the keys of a range.
template <class OfSplit>
inline void add_up_terms(const BackwardParams& p, std::int64_t batch, std::int64_t key_head, std::int64_t splits,
                         std::int64_t first, std::int64_t end, const OfSplit& of_split, const AllTermSums& all) {
  const std::int64_t group = p.heads_q / p.heads_k;
  const auto add_up = [&](auto pick, double* to) {
    if (!to) return;
    for (std::int64_t g = 0; g < group; ++g) {
      double* const row = to + ((batch * p.heads_q) + key_head * group + g) * p.length_k;
      for (std::int64_t split = 0; split < splits; ++split) {
        const double* const from = pick(of_split(split)) + g * p.length_k;
        for (std::int64_t key = first; key < end; ++key) row[key] = (split == 0 ? 0 : row[key]) + from[key];
      }
    }
  };
  add_up([](const TermSums& x) { return x.added; }, all.added);
  add_up([](const TermSums& x) { return x.shares; }, all.shares);
}

// It writes a gradient of numbers of keys, each the sum over the sequences and heads that share it.
template <class Sum, class Sequence>
inline void store_per_key(const BackwardParams& p, const Executor& executor, const double* all, Sum* to,
                          std::int64_t batch_stride, std::int64_t head_stride, std::int64_t key_stride) {
  const std::int64_t heads = head_stride == 0 ? 1 : p.heads_q, packed = p.packed_rows_k;
  const bool one_batch = batch_stride == 0 && !p.cu_seqlens_q;
  const auto sum_of = [&](std::int64_t b, std::int64_t h, std::int64_t key) {
    double sum = 0;
    for (std::int64_t batch = one_batch ? 0 : b; batch < (one_batch ? p.batch : b + 1); ++batch)
      for (std::int64_t head = heads == 1 ? 0 : h; head < (heads == 1 ? p.heads_q : h + 1); ++head)
        sum += all[(batch * p.heads_q + head) * p.length_k + key];
    return Sum(sum);
  };
  for_each_unit(executor, heads, nullptr, 0, [&](std::int64_t h, char*) {
    Sum* const row = to + h * head_stride;
    // Packed keys that no sequence has get 0.
    for (std::int64_t key = 0; p.cu_seqlens_q && key < packed; ++key) row[key * key_stride] = 0;
    for (std::int64_t b = 0; b < (one_batch ? 1 : p.batch); ++b) {
      const Sequence s(p, b);
      for (std::int64_t key = 0; key < s.length_k; ++key)
        row[b * batch_stride + (s.first_k + key) * key_stride] = sum_of(b, h, key);
    }
  });
}

template <class Sum, class Sequence>
inline void store_term_gradients(const BackwardParams& p, const Executor& executor, const AllTermSums& all) {
  const auto store = [&](const double* from, const PerKey& to) {
    if (to.data)
      store_per_key<Sum, Sequence>(p, executor, from, static_cast<Sum*>(to.data), to.batch_stride, to.head_stride, 1);
  };
  store(all.added, p.grad_key_bias);
  store(all.shares, p.grad_key_mask);
  const PairMask& mask = p.grad_attn_mask;
  if (mask.data && mask.row_stride == 0)
    store_per_key<Sum, Sequence>(p, executor, all.added, static_cast<Sum*>(const_cast<void*>(mask.data)),
                                 mask.batch_stride, mask.head_stride, mask.key_stride);
}

}  // namespace attnx::cpu::ATTNX_ISA
