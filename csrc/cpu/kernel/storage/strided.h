// Keys and values that lie in ordinary strided tensors.
#pragma once

#include "../rows.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input, class A>
class StridedStorage {
 public:
  using Element = typename A::Element;
  using Sequence = ATTNX_ISA::Sequence;
  using Number = Input;
  using Result = Input;  // what rows of results are stored as
  static constexpr bool kGathered = false;
  static constexpr bool kSteps = false;  // rows are loaded as rows

  static std::int64_t sequences(const AttentionParams& p) { return p.batch; }

  StridedStorage(const AttentionParams& p, const Sequence& s, std::int64_t key_head)
      : StridedStorage(p, s, key_head, p.key, p.value) {}
  // Tensors like the keys and values of a call stand in their places.
  StridedStorage(const AttentionParams& p, const Sequence& s, std::int64_t key_head, const Tensor& key,
                 const Tensor& value)
      : key_(row_of<const Input>(key, s.batch, key_head, s.first_k)),
        value_(row_of<const Input>(value, s.batch, key_head, s.first_k)),
        key_stride_(key.row_stride),
        value_stride_(value.row_stride),
        head_dim_(p.head_dim),
        value_dim_(p.value_dim) {}

  const Input* key(std::int64_t i) const { return key_ + i * key_stride_; }
  const Input* value(std::int64_t i) const { return value_ + i * value_stride_; }
  std::int64_t value_stride() const { return value_stride_; }
  // Both load count rows from the given one as [rows][stride].
  void load_keys(std::int64_t first, std::int64_t count, Element* to, std::int64_t stride) const {
    load_rows<A>([&](std::int64_t i) { return key(first + i); }, count, head_dim_, to, stride);
  }
  void load_values(std::int64_t first, std::int64_t count, Element* to, std::int64_t stride) const {
    load_rows<A>([&](std::int64_t i) { return value(first + i); }, count, value_dim_, to, stride);
  }
  // Rows that will be loaded soon; where they end beyond the sequence, nothing happens.
  void prefetch(std::int64_t first, std::int64_t count) const {
    prefetch_keys(first, count);
    prefetch_values(first, count);
  }
  void prefetch_keys(std::int64_t first, std::int64_t count) const {
    prefetch_rows(key_ + first * key_stride_, count, head_dim_, key_stride_);
  }
  void prefetch_values(std::int64_t first, std::int64_t count) const {
    prefetch_rows(value_ + first * value_stride_, count, value_dim_, value_stride_);
  }

 private:
  const Input *key_, *value_;
  std::int64_t key_stride_, value_stride_, head_dim_, value_dim_;
};

}  // namespace attnx::cpu::ATTNX_ISA
