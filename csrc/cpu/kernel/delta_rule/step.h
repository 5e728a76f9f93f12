// This runs the gated delta rule token by token, as a decode step has it: the state is read once for what it holds for
// the key and for the query, and once more to be written.
#pragma once

#include "chunk.h"

namespace attnx::cpu::ATTNX_ISA {

inline constexpr std::int64_t kFewTokens = 8;  // more of them are a chunk

template <class Input>
class DeltaRuleSteps {
  using Sum = typename Arithmetic<Input>::Sum;
  static constexpr int kWidth = kLanes<Sum>, kVectors = 4;

 public:
  DeltaRuleSteps(const DeltaRuleForwardParams& p, std::int64_t batch, std::int64_t head, ValueColumns columns)
      : p_(p), batch_(batch), head_(head), columns_(columns) {}

  // It needs memory for a row of keys, of queries, of values and of outputs.
  void run(Sum* memory) const {
    const std::int64_t lanes = round_up(p_.key_dim, kWidth);
    Sum *const key = memory, *const query = key + lanes, *const value = query + lanes;
    set_zero(key, 2 * lanes);
    Sum* const output = value + columns_.count;
    const std::int64_t key_head = head_ / (p_.heads_v / p_.heads_k);
    Sum* const state = static_cast<Sum*>(p_.state) + (batch_ * p_.heads_v + head_) * p_.key_dim * p_.value_dim;
    for (std::int64_t token = 0; token < p_.length; ++token) {
      convert_row(key, row_of<const Input>(p_.key, batch_, key_head, token), p_.key_dim);
      convert_row(query, row_of<const Input>(p_.query, batch_, key_head, token), p_.key_dim);
      if (p_.normalize) normalize(key, lanes), normalize(query, lanes);
      convert_row(value, row_of<const Input>(p_.value, batch_, head_, token) + columns_.first, columns_.count);
      Step step{key, query, value, output, 0, exp(Vec<Sum>{} + number(p_.log_decay, token))[0], number(p_.beta, token)};
      for (std::int64_t k = 0; k < p_.key_dim; ++k) step.product += key[k] * query[k];
      const Sum* const before = token > 0               ? state
                                : p_.initial_state.data ? row_of<const Sum>(p_.initial_state, batch_, head_, 0)
                                                        : nullptr;
      const std::int64_t stride = token > 0 ? p_.value_dim : p_.initial_state.row_stride;
      std::int64_t d = 0;
      for (; d + kVectors * kWidth <= columns_.count; d += kVectors * kWidth)
        advance<kVectors>(step, before, stride, state, d, kVectors * kWidth);
      for (; d < columns_.count; d += kWidth)
        advance<1>(step, before, stride, state, d, smaller<std::int64_t>(kWidth, columns_.count - d));
      convert_row(row_of<Input>(p_.output, batch_, head_, token) + columns_.first, output, columns_.count);
    }
  }

 private:
  struct Step {
    const Sum *key, *query, *value;
    Sum* output;
    Sum product, decay, beta;  // product: key . query
  };

  Sum number(const PerToken& x, std::int64_t token) const {
    return static_cast<const Sum*>(x.data)[batch_ * x.batch_stride + head_ * x.head_stride + token * x.row_stride];
  }

  // These load and store the first `lanes` of some vectors, of which only the last may be cut.
  template <int kCount>
  static ATTNX_INLINE void load_some(const Sum* from, std::int64_t lanes, Vec<Sum> (&x)[kCount]) {
    if (lanes == kCount * kWidth) {
      for (int v = 0; v < kCount; ++v) x[v] = load(from + v * kWidth);
    } else {
      for (int v = 0; v < kCount; ++v) x[v] = Vec<Sum>{};
      __builtin_memcpy(&x, from, std::size_t(lanes) * sizeof(Sum));
    }
  }
  template <int kCount>
  static ATTNX_INLINE void store_some(Sum* to, std::int64_t lanes, const Vec<Sum> (&x)[kCount]) {
    __builtin_memcpy(to, &x, std::size_t(lanes) * sizeof(Sum));
  }

  // This advances the columns d .. d + lanes - 1.
  template <int kCount>
  void advance(const Step& s, const Sum* before, std::int64_t stride, Sum* state, std::int64_t d,
               std::int64_t lanes) const {
    const std::int64_t place = columns_.first + d;
    Vec<Sum> of_key[kCount] = {}, of_query[kCount] = {}, x[kCount];
    if (before) {
      for (std::int64_t k = 0; k < p_.key_dim; ++k) {
        load_some(before + k * stride + place, lanes, x);
        for (int v = 0; v < kCount; ++v) of_key[v] += x[v] * s.key[k], of_query[v] += x[v] * s.query[k];
      }
    }
    Vec<Sum> correction[kCount];
    load_some(s.value + d, lanes, x);
    for (int v = 0; v < kCount; ++v) {
      correction[v] = s.beta * (x[v] - s.decay * of_key[v]);
      of_query[v] = Sum(p_.scale) * (s.decay * of_query[v] + s.product * correction[v]);
    }
    store_some(s.output + d, lanes, of_query);
    for (std::int64_t k = 0; k < p_.key_dim; ++k) {
      if (before) load_some(before + k * stride + place, lanes, x);
      for (int v = 0; v < kCount; ++v) x[v] = (before ? x[v] * s.decay : Vec<Sum>{}) + s.key[k] * correction[v];
      Sum* const to = state + k * p_.value_dim + place;
      if (lanes == kCount * kWidth) {
        for (int v = 0; v < kCount; ++v) store(to + v * kWidth, x[v]);
      } else {
        store_some(to, lanes, x);
      }
    }
  }

  const DeltaRuleForwardParams& p_;
  std::int64_t batch_, head_;
  ValueColumns columns_;
};

}  // namespace attnx::cpu::ATTNX_ISA
