#include "device.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/common/launch.h"
namespace attnx::cuda {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": CUDA error " + cudaGetErrorName(status) + ", " +
                             cudaGetErrorString(status));
}

const Device& current_device() {
  static std::mutex mutex;
  static std::array<std::unique_ptr<Device>, 256> devices;
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  auto& device = devices.at(index);
  if (!device) {
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, name, index), "cudaDeviceGetAttribute");
      return value;
    };
    const int major = attribute(cudaDevAttrComputeCapabilityMajor),
              minor = attribute(cudaDevAttrComputeCapabilityMinor);
    if (major < 8)
      throw std::runtime_error("query: expected a device of compute capability 8.0 or newer, got device " +
                               std::to_string(index) + " of " + std::to_string(major) + "." + std::to_string(minor));
    device = std::make_unique<Device>(
        Device{major, attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)});
  }
  return *device;
}

void launch_kernel(const char* name, const void* kernel, std::int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t stream, void** arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string(name) + ": expected at most 2^31 - 1 tiles, got " + std::to_string(blocks));
  // This call takes a microsecond, and repeating it spares a record of which kernel had it on which device.
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), arguments, std::size_t(shared_bytes),
                         stream),
        name);
}

bool emulated() {
  void* runtime = dlopen("libcudart.so.13", RTLD_LAZY | RTLD_NOLOAD);
  return runtime && dlsym(runtime, "cudaemuRegisterRange");
}

}  // namespace attnx::cuda
