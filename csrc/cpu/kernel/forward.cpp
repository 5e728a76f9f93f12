// Compiled for each instruction set and dtype; picks the policies.
#include "forward.h"

#include "cpu/kernel/scores.h"
#include "dtype.h"
#include "lanes/keys.h"
#include "lanes/queries.h"
#include "storage/staircase.h"
#include "storage/strided.h"
#include "tiles/listed.h"

namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE {

template <class Use>
static auto with_forward(const ForwardParams& p, const Executor& executor, Use use) {
  const auto with_lanes = [&]<class Score, template <class, class> class Storage>() {
    using Keys = KeysOnLanes<Arithmetic<Input>, Softmax>;
    if (p.length_q * (p.heads_q / p.heads_k) <= Keys::kMostRows)
      return use(Forward<Input, Score, BandTiles, Storage, KeysOnLanes>(p, executor));
    return use(Forward<Input, Score, BandTiles, Storage, QueriesOnLanes>(p, executor));
  };
  if constexpr (!__is_same(Input, double)) {
    if (p.cache)
      return with_forward_score(
          p.score, [&]<class Score>() { return with_lanes.template operator()<Score, StaircaseStorage>(); });
  }
  if (p.key_blocks.counts)
    return with_forward_score(p.score, [&]<class Score>() {
      return use(Forward<Input, Score, ListedTiles, StridedStorage, QueriesOnLanes>(p, executor));
    });
  return with_forward_band_score(
      p.score, [&]<class Score>() { return with_lanes.template operator()<Score, StridedStorage>(); });
}

std::size_t forward_workspace(const ForwardParams& p, const Executor& executor) {
  return with_forward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void forward(const ForwardParams& p, const Executor& executor, char* workspace) {
  with_forward(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE
