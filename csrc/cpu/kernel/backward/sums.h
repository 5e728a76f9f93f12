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
  const auto store = [&](auto pick, Sum factor, const Tensor& addend, const Tensor& to, std::int64_t key,
                         std::int64_t dim) {
    Sum row[kMaxHeadDim];
    const Sum* const first = pick(of_split(0));
    for (std::int64_t d = 0; d < dim; ++d) row[d] = splits == 1 ? first[d] * factor : first[d];
    for (std::int64_t split = 1; split < splits; ++split) {
      const Sum* const from = pick(of_split(split));
      for (std::int64_t d = 0; d < dim; ++d) row[d] += from[d];
    }
    if (splits > 1)
      for (std::int64_t d = 0; d < dim; ++d) row[d] *= factor;
    add_row(addend, s.batch, key_head, s.first_k + key, dim, row);
    convert_row(row_of<Input>(to, s.batch, key_head, s.first_k + key), row, dim);
  };
  for (std::int64_t key = s.length_k * part / splits; key < s.length_k * (part + 1) / splits; ++key) {
    store([&](const Sums& x) { return x.grad_key + key * sizes.head_lanes; }, Sum(p.scale), p.grad_key_addend,
          p.grad_key, key, p.head_dim);
    store([&](const Sums& x) { return x.grad_value + key * sizes.value_lanes; }, Sum(1), p.grad_value_addend,
          p.grad_value, key, p.value_dim);
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
