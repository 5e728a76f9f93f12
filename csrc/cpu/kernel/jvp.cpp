// This unit is compiled for each instruction set and dtype. It picks the policies of the forward along a direction.
#include "cpu/kernel/scores.h"
#include "dtype.h"
#include "forward.h"
#include "lanes/queries.h"
#include "storage/tangents.h"
#include "tangents/given.h"
#include "tiles/band.h"

namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE {

template <class A, class Score>
using QueriesWithTangents = QueriesOnLanes<A, Score, PlainLogits, GivenTangents>;

template <class Use>
static auto with_jvp(const JvpParams& p, const Executor& executor, Use use) {
  return with_forward_score(p.score, [&]<class Score>() {
    return use(Forward<Input, Score, BandTiles, StorageWithTangents, QueriesWithTangents>(p, executor));
  });
}

std::size_t jvp_workspace(const JvpParams& p, const Executor& executor) {
  return with_jvp(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void jvp(const JvpParams& p, const Executor& executor, char* workspace) {
  with_jvp(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE
