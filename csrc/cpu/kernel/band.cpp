// This unit is compiled for each instruction set and dtype. It picks the policies of the scores that have no loops but
// those over a band.
#include "tiles/band.h"
#include "backward.h"
#include "cpu/kernel/scores.h"
#include "dtype.h"
#include "forward.h"
#include "lanes/keys.h"
#include "lanes/queries.h"
#include "storage/strided.h"

namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE {

template <class Use>
static auto with_forward(const ForwardParams& p, const Executor& executor, Use use) {
  return with_forward_band_score(p.score, [&]<class Score>() {
    using Keys = KeysOnLanes<Arithmetic<Input>, Score>;
    if (p.length_q * (p.heads_q / p.heads_k) <= Keys::kMostRows)
      return use(Forward<Input, Score, BandTiles, StridedStorage, KeysOnLanes>(p, executor));
    return use(Forward<Input, Score, BandTiles, StridedStorage, QueriesOnLanes>(p, executor));
  });
}

template <class Use>
static auto with_backward(const BackwardParams& p, const Executor& executor, Use use) {
  return with_backward_band_score(
      p.score, [&]<class Score>() { return use(Backward<Input, Score, BandTiles, StridedStorage>(p, executor)); });
}

std::size_t band_forward_workspace(const ForwardParams& p, const Executor& executor) {
  return with_forward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void band_forward(const ForwardParams& p, const Executor& executor, char* workspace) {
  with_forward(p, executor, [&](const auto& f) { f.run(workspace); });
}

std::size_t band_backward_workspace(const BackwardParams& p, const Executor& executor) {
  return with_backward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void band_backward(const BackwardParams& p, const Executor& executor, char* workspace) {
  with_backward(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE
