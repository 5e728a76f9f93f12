// This places arrays in a call's workspace.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnx::cuda {

// The arrays are consecutive, and each lies on 256 bytes.
class WorkspaceLayout {
  std::size_t bytes_ = 0;

 public:
  std::size_t bytes() const { return bytes_; }
  // This returns where n elements lie; in a workspace at null the addresses are the offsets.
  template <class T>
  T* place(void* workspace, std::int64_t n) {
    T* const at = reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(workspace) + bytes_);
    bytes_ += (std::size_t(n) * sizeof(T) + 255) / 256 * 256;
    return at;
  }
};

}  // namespace attnx::cuda
