// Keys and values lie in ordinary strided tensors, and their tangents in others.
#pragma once

#include "attnx/jvp_params.h"
#include "strided.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Input, class A>
class StorageWithTangents : public StridedStorage<Input, A> {
  using Strided = StridedStorage<Input, A>;

 public:
  StorageWithTangents(const JvpParams& p, const Sequence& s, std::int64_t key_head)
      : Strided(p, s, key_head), p_(p), tangents_(p, s, key_head, p.tangent_key, p.tangent_value) {}

  // What is read of these must be among the tangents that the call has.
  const Strided& tangents() const { return tangents_; }

  void prefetch(std::int64_t first, std::int64_t count) const {
    Strided::prefetch(first, count);
    if (p_.tangent_key.data) tangents_.prefetch_keys(first, count);
    if (p_.tangent_value.data) tangents_.prefetch_values(first, count);
  }

 private:
  const JvpParams& p_;
  Strided tangents_;
};

}  // namespace attnx::cpu::ATTNX_ISA
