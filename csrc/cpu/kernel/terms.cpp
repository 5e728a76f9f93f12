// Compiled for each instruction set and dtype; picks the policies of the loops whose logits have terms.
#include "logits/terms.h"
#include "backward.h"
#include "cpu/kernel/scores.h"
#include "dtype.h"
#include "forward.h"
#include "lanes/queries.h"
#include "storage/strided.h"
#include "tiles/listed.h"

namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE {

template <class A, class Score>
using QueriesWithTerms = QueriesOnLanes<A, Score, LogitsWithTerms>;

template <class Action>
static auto with_tiles(const AttentionParams& p, const Action& action) {
  return p.key_blocks.counts ? action.template operator()<ListedTiles>() : action.template operator()<BandTiles>();
}

template <class Use>
static auto with_forward(const ForwardParams& p, const Executor& executor, Use use) {
  return with_tiles(p, [&]<class Tiles>() {
    return with_forward_score(p.score, [&]<class Score>() {
      return use(Forward<Input, Score, Tiles, StridedStorage, QueriesWithTerms>(p, executor));
    });
  });
}

template <class Use>
static auto with_backward(const BackwardParams& p, const Executor& executor, Use use) {
  return with_tiles(p, [&]<class Tiles>() {
    return with_backward_score(p.score, [&]<class Score>() {
      return use(Backward<Input, Score, Tiles, StridedStorage, LogitsWithTerms>(p, executor));
    });
  });
}

std::size_t forward_with_terms_workspace(const ForwardParams& p, const Executor& executor) {
  return with_forward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void forward_with_terms(const ForwardParams& p, const Executor& executor, char* workspace) {
  with_forward(p, executor, [&](const auto& f) { f.run(workspace); });
}

std::size_t backward_with_terms_workspace(const BackwardParams& p, const Executor& executor) {
  return with_backward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void backward_with_terms(const BackwardParams& p, const Executor& executor, char* workspace) {
  with_backward(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE
