// This runs a kernel of the instruction set in use, on as many of the executor's threads as the work is worth.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <string>

#include "attnx/out_of_memory.h"
#include "kernels.h"

namespace attnx::cpu {

// It returns the kernels of the instruction set in use.
const Kernels& chosen_kernels(DType dtype);

struct Free {
  void operator()(char* block) const { ::operator delete(block, std::align_val_t(64)); }
};

template <class Params>
void run(std::size_t (*Kernels::*workspace_bytes)(const Params&, const Executor&),
         void (*Kernels::*kernel)(const Params&, const Executor&, char*), const Params& params, Executor executor,
         double operations) {
  // Every million operations is worth another thread: it takes about as long to wake one.
  executor.threads = int(std::min(double(executor.threads), 1 + operations / 1e6));
  const Kernels& kernels = chosen_kernels(params.dtype);
  const std::size_t bytes = (kernels.*workspace_bytes)(params, executor);
  const std::unique_ptr<char, Free> workspace(
      static_cast<char*>(::operator new(bytes, std::align_val_t(64), std::nothrow)));
  if (!workspace) throw OutOfMemory("memory: expected " + std::to_string(bytes) + " bytes of workspace, got none");
  (kernels.*kernel)(params, executor, workspace.get());
}

}  // namespace attnx::cpu
