// These are switches that the environment sets to 1 before the library is loaded.
#pragma once

#include <cstdlib>
#include <string_view>

namespace attnx {

inline bool is_one(const char* variable) {
  const char* value = std::getenv(variable);
  return value && std::string_view(value) == "1";
}

// Calls on CPU tensors are meant for the CUDA kernels, which the emulator runs on host memory.
inline const bool kCudaOnHost = is_one("ATTNX_CUDA_ON_HOST");

// With this checks cover what lies in device memory, too, although that waits for the device.
inline const bool kDebug = is_one("ATTNX_DEBUG");

}  // namespace attnx
