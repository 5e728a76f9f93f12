// This unit is compiled once for each instruction set, and picks the types.
#include "dtype.h"
#include "linear_state/backward.h"
#include "linear_state/forward.h"

namespace attnx::cpu::ATTNX_ISA {

std::size_t linear_state_forward_workspace(const LinearStateForwardParams& p, const Executor& executor) {
  return with_kernel<LinearStateForward>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void linear_state_forward(const LinearStateForwardParams& p, const Executor& executor, char* workspace) {
  with_kernel<LinearStateForward>(p, executor, [&](const auto& f) { f.run(workspace); });
}

std::size_t linear_state_backward_workspace(const LinearStateBackwardParams& p, const Executor& executor) {
  return with_kernel<LinearStateBackward>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void linear_state_backward(const LinearStateBackwardParams& p, const Executor& executor, char* workspace) {
  with_kernel<LinearStateBackward>(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA
