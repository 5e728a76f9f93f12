// Compiled for each instruction set and dtype; picks the policies of the loops over clusters.
#include "cpu/kernel/scores.h"
#include "dtype.h"
#include "routing/attention.h"

namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE {

template <class Use>
static auto with_forward(const ForwardParams& p, const Executor& executor, Use use) {
  return with_forward_score(p.score, [&]<class Score>() { return use(RoutedForward<Input, Score>(p, executor)); });
}

template <class Use>
static auto with_backward(const BackwardParams& p, const Executor& executor, Use use) {
  return with_backward_score(p.score, [&]<class Score>() { return use(RoutedBackward<Input, Score>(p, executor)); });
}

std::size_t routed_forward_workspace(const ForwardParams& p, const Executor& executor) {
  return with_forward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void routed_forward(const ForwardParams& p, const Executor& executor, char* workspace) {
  with_forward(p, executor, [&](const auto& f) { f.run(workspace); });
}

std::size_t routed_backward_workspace(const BackwardParams& p, const Executor& executor) {
  return with_backward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void routed_backward(const BackwardParams& p, const Executor& executor, char* workspace) {
  with_backward(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE
