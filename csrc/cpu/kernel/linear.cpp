// Compiled once per instruction set; picks the types.
#include "dtype.h"
#include "linear/backward.h"

namespace attnx::cpu::ATTNX_ISA {

std::size_t linear_forward_workspace(const LinearForwardParams& p, const Executor& executor) {
  return with_kernel<LinearForward>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void linear_forward(const LinearForwardParams& p, const Executor& executor, char* workspace) {
  with_kernel<LinearForward>(p, executor, [&](const auto& f) { f.run(workspace); });
}

std::size_t linear_backward_workspace(const LinearBackwardParams& p, const Executor& executor) {
  return with_kernel<LinearBackward>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void linear_backward(const LinearBackwardParams& p, const Executor& executor, char* workspace) {
  with_kernel<LinearBackward>(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA
