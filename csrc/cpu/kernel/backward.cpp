// Compiled for each instruction set and dtype; picks the policies.
#include "backward.h"

#include "cpu/kernel/scores.h"
#include "dtype.h"
#include "storage/strided.h"
#include "tiles/listed.h"

namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE {

template <class Use>
static auto with_backward(const BackwardParams& p, const Executor& executor, Use use) {
  const auto with_tiles = [&]<class Tiles>() {
    return with_backward_score(
        p.score, [&]<class Score>() { return use(Backward<Input, Score, Tiles, StridedStorage>(p, executor)); });
  };
  return p.key_blocks.counts ? with_tiles.template operator()<ListedTiles>()
                             : with_tiles.template operator()<BandTiles>();
}

std::size_t backward_workspace(const BackwardParams& p, const Executor& executor) {
  return with_backward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void backward(const BackwardParams& p, const Executor& executor, char* workspace) {
  with_backward(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE
