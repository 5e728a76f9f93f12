// What the launchers of all kernels share, and their declarations: one instantiation a translation unit, so that each
// compiles in seconds. The units are written by CMake; nothing but them includes a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "attnx/params.h"

namespace attnx::cuda {

// Of the current device.
struct Device {
  int major;  // of the compute capability
  int sm_count;
  int shared_bytes;  // that a block can have
};
const Device& current_device();  // throws where it has no kernels

// Throws std::runtime_error with the name of what failed.
void check(cudaError_t status, const char* what);

// Launches blocks of a kernel that wants this much dynamic shared memory.
void launch_kernel(const char* name, const void* kernel, std::int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t stream, void** arguments);

template <class... Args>
void launch_kernel(const char* name, const void* kernel, std::int64_t blocks, int threads, int shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  launch_kernel(name, kernel, blocks, threads, shared_bytes, stream, static_cast<void**>(pointers));
}

template <class Params>
struct Arguments;

// Which of the instantiations for a score, a dtype and a padded head dimension.
struct Variant {
  bool wide, listed, aligned;
};

struct TmaForwardArguments;
struct TmaBackwardArguments;

template <Score kScore, DType kDType, int kHeadDim>
void launch_forward(const Arguments<ForwardParams>& args, Variant variant, std::int64_t blocks, cudaStream_t stream);
template <Score kScore, DType kDType, int kHeadDim>
void launch_forward_sm90(const TmaForwardArguments& args, Variant variant, std::int64_t blocks, cudaStream_t stream);
// The main kernel, and the pass that makes grad_query of its sums.
template <Score kScore, DType kDType, int kHeadDim>
void launch_backward(const Arguments<BackwardParams>& args, Variant variant, std::int64_t blocks, cudaStream_t stream);
template <Score kScore, DType kDType, int kHeadDim>
void launch_backward_sm90(const TmaBackwardArguments& args, Variant variant, std::int64_t blocks, cudaStream_t stream);

// The passes after the one and around the other.
void launch_combine(const Arguments<ForwardParams>& args, int padded_rows, int features, cudaStream_t stream);
void launch_row_terms(const Arguments<BackwardParams>& args, int rows_of_tile, bool aligned, cudaStream_t stream);
void launch_list_order(const Arguments<BackwardParams>& args, cudaStream_t stream);
void launch_parameter_sums(const Arguments<BackwardParams>& args, int rows_of_tile, int score_warps,
                           cudaStream_t stream);

}  // namespace attnx::cuda
