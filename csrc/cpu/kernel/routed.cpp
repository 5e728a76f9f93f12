// Compiled once per instruction set; picks the policies of the loops over clusters.
#include "dtype.h"
#include "routing/attention.h"
#include "score/sigmoid.h"
#include "score/softmax.h"

namespace attnx::cpu::ATTNX_ISA {

template <template <class, class> class Kernel, class Params, class Use>
static auto with_routed(const Params& p, const Executor& executor, Use use) {
  const auto with_score = [&]<class Input>() {
    if (p.score == Score::kSigmoid) return use(Kernel<Input, Sigmoid>(p, executor));
    return use(Kernel<Input, Softmax>(p, executor));
  };
  return with_input(p.dtype, with_score);
}

std::size_t routed_forward_workspace(const ForwardParams& p, const Executor& executor) {
  return with_routed<RoutedForward>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void routed_forward(const ForwardParams& p, const Executor& executor, char* workspace) {
  with_routed<RoutedForward>(p, executor, [&](const auto& f) { f.run(workspace); });
}

std::size_t routed_backward_workspace(const BackwardParams& p, const Executor& executor) {
  return with_routed<RoutedBackward>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void routed_backward(const BackwardParams& p, const Executor& executor, char* workspace) {
  with_routed<RoutedBackward>(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA
