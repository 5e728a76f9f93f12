// This describes the device underneath, and launches one kernel on it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

namespace attnx::cuda {

struct Device {
  int major;  // of the compute capability
  int sm_count;
  int shared_bytes;  // what a block can have
};
// This returns the current device. It throws std::runtime_error where the device has no kernels.
const Device& current_device();

// This throws std::runtime_error with the name of what failed.
void check(cudaError_t status, const char* what);

// This launches blocks of a kernel that wants this much dynamic shared memory.
void launch_kernel(const char* name, const void* kernel, std::int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t stream, void** arguments);

template <class... Parameters, class... Args>
void launch_kernel(const char* name, void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  static_assert((std::is_same_v<std::remove_const_t<Parameters>, Args> && ...));
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  launch_kernel(name, reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, stream,
                static_cast<void**>(pointers));
}

}  // namespace attnx::cuda
