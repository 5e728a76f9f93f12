// The sums that the backward loop leaves for a key head, one of each split of its work, become gradients here.
#pragma once

#include "memory.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Sum>
inline void add_row(const Tensor& addend, std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t dim,
                    Sum* to) {
  if (!addend.data) return;
  const Sum* const from = row_of<const Sum>(addend, batch, head, row);
  for (std::int64_t d = 0; d < dim; ++d) to[d] += from[d];
}

// It adds up the sums of the splits of a key head, in their order, and stores them; each of as many parts does its
// share of the keys.
template <class Input, class Logits, class Sum>
inline void store_sums(const BackwardParams& p, const BackwardSizes<Sum>& sizes, std::int64_t head, std::int64_t splits,
                       std::int64_t part, char* sums) {
  using Sums = BackwardSums<Sum, Logits>;
  const std::int64_t key_head = head % p.heads_k, bytes = Sums(sizes, nullptr).bytes;
  const Sequence s(p, head / p.heads_k);
  const auto of_split = [&](std::int64_t split) { return Sums(sizes, sums + split * bytes); };
  const auto add_up = [&](auto pick, std::int64_t n, Sum* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = 0;
    for (std::int64_t split = 0; split < splits; ++split) {
      const Sum* from = pick(of_split(split));
      for (std::int64_t i = 0; i < n; ++i) to[i] += from[i];
    }
  };
  Sum row[kMaxHeadDim];
  for (std::int64_t key = s.length_k * part / splits; key < s.length_k * (part + 1) / splits; ++key) {
    add_up([&](const Sums& x) { return x.grad_key + key * sizes.head_lanes; }, p.head_dim, row);
    for (std::int64_t d = 0; d < p.head_dim; ++d) row[d] *= Sum(p.scale);
    add_row(p.grad_key_addend, s.batch, key_head, s.first_k + key, p.head_dim, row);
    convert_row(row_of<Input>(p.grad_key, s.batch, key_head, s.first_k + key), row, p.head_dim);
    add_up([&](const Sums& x) { return x.grad_value + key * sizes.value_lanes; }, p.value_dim, row);
    add_row(p.grad_value_addend, s.batch, key_head, s.first_k + key, p.value_dim, row);
    convert_row(row_of<Input>(p.grad_value, s.batch, key_head, s.first_k + key), row, p.value_dim);
  }
  if (part != 0) return;
  const auto store_heads = [&](auto pick, double* to) {
    if (!to) return;
    for (std::int64_t g = 0; g < sizes.group; ++g) {
      double sum = 0;
      for (std::int64_t split = 0; split < splits; ++split) sum += pick(of_split(split))[g];
      to[s.batch * p.heads_q + key_head * sizes.group + g] = sum;
    }
  };
  store_heads([](const Sums& x) { return x.grad_bias; }, p.grad_bias);
  store_heads([](const Sums& x) { return x.grad_slope; }, p.grad_alibi_slopes);
  store_heads([](const Sums& x) { return x.grad_sink; }, p.grad_sink);
}

}  // namespace attnx::cpu::ATTNX_ISA
