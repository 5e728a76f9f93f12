// Gradients of the terms that several rows share: sums over the rows of a unit, then over units, and in the end over
// sequences and heads that share a number, always in the same order.
#pragma once

#include "../arena.h"
#include "../units.h"
#include "attnx/params.h"

namespace attnx::cpu::ATTNX_ISA {

// Whether rows share what is added to a key, so that its gradient is a sum over rows.
inline bool sums_added(const BackwardParams& p) {
  return p.grad_key_bias.data || (p.grad_attn_mask.data && p.grad_attn_mask.row_stride == 0);
}
inline bool sums_shares(const BackwardParams& p) { return p.grad_key_mask.data; }
inline bool sums_distances(const BackwardParams& p) { return p.grad_attn_mask.data && p.grad_attn_mask.by_distance(); }
// How many distances there are between queries and keys.
inline std::int64_t distances(const AttentionParams& p) { return p.length_q + p.length_k - 1; }

// Whether units of different heads add to the same rows of the gradient of a mask.
inline bool heads_share_rows(const BackwardParams& p) {
  const PairMask& grad = p.grad_attn_mask;
  if (!grad.data || grad.row_stride == 0 || grad.by_distance()) return false;
  return (grad.batch_stride == 0 && p.batch > 1) || (grad.head_stride == 0 && p.heads_q > 1);
}

// What a unit sums over its rows, [group][keys], and over its pairs of each distance, [group][distances]. These are
// numbered by j - i + length_q - 1, so that they ascend with the keys.
struct TermSums {
  double *added, *shares, *distances;
  std::int64_t keys;

  template <class Sizes>
  TermSums(const Sizes& sizes, Arena& arena)
      : added(sizes.sums_added ? arena.take<double>(sizes.group * sizes.keys) : nullptr),
        shares(sizes.sums_shares ? arena.take<double>(sizes.group * sizes.keys) : nullptr),
        distances(sizes.distances > 0 ? arena.take<double>(sizes.group * sizes.distances) : nullptr),
        keys(sizes.keys) {}
};

// The sums of all heads, [batch][heads_q][keys or distances].
struct AllTermSums {
  double *added, *shares, *distances;
  std::int64_t bytes;

  AllTermSums(const BackwardParams& p, char* block) {
    Arena arena(block);
    const std::int64_t all = p.batch * p.heads_q * p.length_k;
    added = sums_added(p) ? arena.take<double>(all) : nullptr;
    shares = sums_shares(p) ? arena.take<double>(all) : nullptr;
    distances = sums_distances(p) ? arena.take<double>(p.batch * p.heads_q * ATTNX_ISA::distances(p)) : nullptr;
    bytes = arena.used();
  }
};

// It adds up the sums of the splits of a key head, of_split(0), of_split(1), ..., for the keys of a sequence. Each of
// as many parts does its share.
template <class OfSplit>
inline void add_up_terms(const BackwardParams& p, std::int64_t batch, std::int64_t key_head, std::int64_t keys,
                         std::int64_t splits, std::int64_t part, const OfSplit& of_split, const AllTermSums& all) {
  const std::int64_t group = p.heads_q / p.heads_k;
  const auto add_up = [&](auto pick, double* to, std::int64_t stride, std::int64_t count) {
    if (!to) return;
    const std::int64_t first = count * part / splits, end = count * (part + 1) / splits;
    for (std::int64_t g = 0; g < group; ++g) {
      double* const row = to + (batch * p.heads_q + key_head * group + g) * stride;
      for (std::int64_t split = 0; split < splits; ++split) {
        const double* const from = pick(of_split(split)) + g * stride;
        for (std::int64_t i = first; i < end; ++i) row[i] = (split == 0 ? 0 : row[i]) + from[i];
      }
    }
  };
  add_up([](const TermSums& x) { return x.added; }, all.added, p.length_k, keys);
  add_up([](const TermSums& x) { return x.shares; }, all.shares, p.length_k, keys);
  add_up([](const TermSums& x) { return x.distances; }, all.distances, distances(p), distances(p));
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

// It writes the gradient of numbers by distance, likewise. `to` is that of the pair (0, 0).
template <class Sum>
inline void store_per_distance(const BackwardParams& p, const Executor& executor, const double* all) {
  const PairMask& to = p.grad_attn_mask;
  const bool one_head = to.head_stride == 0, one_batch = to.batch_stride == 0;
  const std::int64_t count = distances(p), heads = one_head ? 1 : p.heads_q, batches = one_batch ? 1 : p.batch;
  for_each_unit(executor, batches * heads, nullptr, 0, [&](std::int64_t unit, char*) {
    const std::int64_t b = unit / heads, h = unit % heads;
    Sum* const last =
        static_cast<Sum*>(const_cast<void*>(to.data)) + b * to.batch_stride + h * to.head_stride + p.length_q - 1;
    for (std::int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (std::int64_t batch = b; batch < (one_batch ? p.batch : b + 1); ++batch)
        for (std::int64_t head = h; head < (one_head ? p.heads_q : h + 1); ++head)
          sum += all[(batch * p.heads_q + head) * count + i];
      last[-i] = Sum(sum);
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
  if (all.distances) store_per_distance<Sum>(p, executor, all.distances);
  const PairMask& mask = p.grad_attn_mask;
  if (mask.data && mask.row_stride == 0)
    store_per_key<Sum, Sequence>(p, executor, all.added, static_cast<Sum*>(const_cast<void*>(mask.data)),
                                 mask.batch_stride, mask.head_stride, mask.key_stride);
}

}  // namespace attnx::cpu::ATTNX_ISA
