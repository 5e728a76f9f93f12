// Working storage of one worker, cut from one block. Built on a null block it only counts.
#pragma once

#include "simd.h"

namespace attnx::cpu::ATTNX_ISA {

class Arena {
 public:
  explicit Arena(char* block) : block_(block) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::int64_t offset = used_;
    used_ = round_up(used_ + count * std::int64_t(sizeof(T)), kAlignment);
    return block_ ? reinterpret_cast<T*>(block_ + offset) : nullptr;
  }
  std::int64_t used() const { return used_; }

  static constexpr std::int64_t kAlignment = 64;

 private:
  char* block_;
  std::int64_t used_ = 0;
};

}  // namespace attnx::cpu::ATTNX_ISA
