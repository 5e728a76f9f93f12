// Work dealt to threads: units of it, taken by whoever is free.
#pragma once

#include "../executor.h"
#include "simd.h"

namespace attnx::cpu::ATTNX_ISA {

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
