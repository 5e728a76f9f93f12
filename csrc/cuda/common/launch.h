// This says where kernels are launched, and with what memory.
#pragma once

#include "cuda/common/mainloop_choice.h"

namespace attnx::cuda {

struct Launch {
  void* stream = nullptr;      // a cudaStream_t of the current device
  void* workspace = nullptr;   // device memory of *_workspace() bytes, 256-byte aligned; null where that is 0
  bool deterministic = false;  // backward: sums in a fixed order
  std::optional<Mainloop> mainloop = asked_mainloop();  // looked up once: workspace and kernel agree
};

// This tells whether the CUDA runtime underneath is the emulator, whose device memory is host memory.
bool emulated();

}  // namespace attnx::cuda
