// Work dealt to threads: units of it, taken by whoever is free.
#pragma once

#include "../executor.h"
#include "simd.h"

namespace attnx::cpu::ATTNX_ISA {

// It tells whether whole units keep nine tenths of the threads' time busy.
inline bool keeps_busy(std::int64_t units, std::int64_t threads) { return units * 10 >= round_up(units, threads) * 9; }

// Calls task(unit, worker's memory) for every unit, on all threads.
template <class Task>
inline void for_each_unit(const Executor& executor, std::int64_t units, char* memory, std::int64_t worker_bytes,
                          const Task& task) {
  std::int64_t next = 0;
  executor.run([&](int worker) {
    for (;;) {
      const std::int64_t unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (unit >= units) return;
      task(unit, memory + worker * worker_bytes);
    }
  });
}

}  // namespace attnx::cpu::ATTNX_ISA
