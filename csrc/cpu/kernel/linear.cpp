// Compiled once per instruction set; picks the types.
#include "linear/backward.h"

namespace attnx::cpu::ATTNX_ISA {

template <template <class> class Kernel, class Params, class Use>
static auto with_kernel(const Params& p, const Executor& executor, Use use) {
  switch (p.dtype) {
    case DType::kBFloat16: return use(Kernel<BFloat16>(p, executor));
    case DType::kFloat16: return use(Kernel<Float16>(p, executor));
    case DType::kFloat64: return use(Kernel<double>(p, executor));
    default: return use(Kernel<float>(p, executor));
  }
}

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
