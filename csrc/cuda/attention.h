// The CUDA kernels' entry points. They launch on a stream and return: no synchronisation, no allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "attnx/block_sampling.h"
#include "attnx/params.h"
#include "cuda/dispatch/mainloop_choice.h"

namespace attnx::cuda {

struct Launch {
  void* stream = nullptr;      // a cudaStream_t of the current device
  void* workspace = nullptr;   // device memory of *_workspace() bytes, 256-byte aligned; null where that is 0
  bool deterministic = false;  // backward: sums in a fixed order
  std::optional<Mainloop> mainloop = asked_mainloop();  // looked up once: workspace and kernel agree
};

// What forward and backward need of device memory besides their tensors, in bytes, on the current device.
std::size_t forward_workspace(const ForwardParams& params, const Launch& launch);
std::size_t backward_workspace(const BackwardParams& params, const Launch& launch);

// They throw std::runtime_error with the kernel's name where the device has no kernel or the runtime reports an error.
void forward(const ForwardParams& params, const Launch& launch);
void backward(const BackwardParams& params, const Launch& launch);

// to[h] = the sum over b of from[b][h], on device memory: the gradients of numbers per head.
void sum_over_batch(const double* from, float* to, std::int64_t batch, std::int64_t heads, const Launch& launch);

// weights[i] = sigmoid(logits[i]) as the kernels compute it for the dtype, or by the exact formula; device memory.
// It is a hook for tests: the exact formula is the oracle of the fast one.
void sigmoid_weights(const float* logits, float* weights, std::int64_t n, DType dtype, bool exact,
                     const Launch& launch);

// It tells of every block (head, i, j) of a round whether it is kept on its own, and when it arrives in the race of a
// fixed number (block_sampling.h), infinity where it may not take part; device memory. It is a hook for tests: the
// device draws what the host does.
void sampled_blocks(const BlockGrid& grid, const SamplingRound& round, const float* keep, std::int64_t heads,
                    std::uint8_t* kept, double* arrival, const Launch& launch);

// The kernel that a call would run.
struct KernelDescription {
  std::string kernel;        // as profilers show it: "attnx_forward_sm80"
  std::string mainloop;      // "sm80"
  int rows = 0, keys = 0;    // of a tile
  int head_dim = 0;          // what it is padded to
  bool aligned = true;       // whether rows lie on 16 bytes
  int splits = 1;            // shares of the keys
  std::string why_not_sm90;  // on a device for it
};
KernelDescription describe(const ForwardParams& params);
KernelDescription describe(const BackwardParams& params);

// Whether the CUDA runtime underneath is the emulator, whose device memory is host memory.
bool emulated();

}  // namespace attnx::cuda
