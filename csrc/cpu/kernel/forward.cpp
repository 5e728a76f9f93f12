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
  const auto with_policies =
      [&]<class Tiles, template <class, class> class Storage, template <class, class> class Lanes>() {
        return with_forward_score(
            p.score, [&]<class Score>() { return use(Forward<Input, Score, Tiles, Storage, Lanes>(p, executor)); });
      };
  const auto with_lanes = [&]<template <class, class> class Storage>() {
    using Keys = KeysOnLanes<Arithmetic<Input>, Softmax>;
    if (p.length_q * (p.heads_q / p.heads_k) <= Keys::kMostRows)
      return with_policies.template operator()<BandTiles, Storage, KeysOnLanes>();
    return with_policies.template operator()<BandTiles, Storage, QueriesOnLanes>();
  };
  if constexpr (!__is_same(Input, double)) {
    if (p.cache) return with_lanes.template operator()<StaircaseStorage>();
  }
  if (p.key_blocks.counts) return with_policies.template operator()<ListedTiles, StridedStorage, QueriesOnLanes>();
  return with_lanes.template operator()<StridedStorage>();
}

std::size_t forward_workspace(const ForwardParams& p, const Executor& executor) {
  return with_forward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void forward(const ForwardParams& p, const Executor& executor, char* workspace) {
  with_forward(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA::ATTNX_DTYPE
