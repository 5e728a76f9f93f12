// One long sequence of rows is worked at by all threads, whose sums lie in the same memory: its rows and its keys are
// cut into blocks, and in turn t the rows of block i meet the keys of block (i + t) % blocks. No two blocks of a turn
// share rows or keys, and what a row or a key has is added up in the order of the turns, whoever does it.
#pragma once

#include "../../executor.h"
#include "../simd.h"

namespace attnx::cpu::ATTNX_ISA {

// It calls task(worker, sequence, block, turn) for each block of each turn; blocks_of(sequence) is 0 for one that is
// not cut.
template <class BlocksOf, class Task>
inline void for_each_turn(const Executor& executor, std::int64_t sequences, const BlocksOf& blocks_of,
                          const Task& task) {
  std::int64_t turns = 0;
  for (std::int64_t s = 0; s < sequences; ++s) turns = larger(turns, blocks_of(s));
  for (std::int64_t turn = 0; turn < turns; ++turn) {
    std::int64_t next = 0;
    executor.run([&](int worker) {
      const auto take = [&] { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); };
      std::int64_t mine = take(), before = 0;  // the block to do, and how many those of earlier sequences are
      for (std::int64_t s = 0; s < sequences; ++s) {
        const std::int64_t blocks = blocks_of(s) > turn ? blocks_of(s) : 0;
        for (; mine < before + blocks; mine = take()) task(worker, s, mine - before, turn);
        before += blocks;
      }
    });
  }
}

}  // namespace attnx::cpu::ATTNX_ISA
