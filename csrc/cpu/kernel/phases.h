// Work in phases, all in one parallel region. A phase waits until earlier ones are done, not until all threads have
// come: one that the machine lent to another process in the meantime holds up nobody but those who need its unit.
#pragma once

#include <sched.h>

#include "../executor.h"
#include "arena.h"
#include "units.h"

namespace attnx::cpu::ATTNX_ISA {

class Phases {
 public:
  // Of `count` phases each begins when those are done that are `distance` or more before it.
  Phases(Arena& arena, std::int64_t count, std::int64_t distance)
      : count_(count), distance_(distance), counters_(arena.take<Counter>(count)) {}

  // It calls task(phase, unit, worker) for each of the units(phase) units of each phase, which are dealt in their order
  // to whoever is free.
  template <class Units, class Task>
  void run(const Executor& executor, const Units& units, const Task& task) const {
    __builtin_memset(counters_, 0, std::size_t(count_) * sizeof(Counter));
    executor.run([&](int worker) {
      std::int64_t done = 0;  // so many phases are known to be
      for (std::int64_t phase = 0; phase < count_; ++phase) {
        const std::int64_t all = units(phase);
        for (;;) {
          const std::int64_t unit = __atomic_fetch_add(&counters_[phase].taken, 1, __ATOMIC_RELAXED);
          if (unit >= all) break;
          for (; done <= phase - distance_; ++done) wait(counters_[done], units(done));
          task(phase, unit, worker);
          __atomic_fetch_add(&counters_[phase].done, 1, __ATOMIC_RELEASE);
        }
      }
    });
  }

 private:
  struct Counter {
    std::int64_t taken, done;
  };

  // What is missing is being done: a worker takes a unit of a later phase only when it has done its own of this one.
  static void wait(const Counter& counter, std::int64_t units) {
    constexpr int kSpins = 1000;
    for (int spins = 0; __atomic_load_n(&counter.done, __ATOMIC_ACQUIRE) < units; ++spins)
      if (spins >= kSpins) sched_yield();
  }

  std::int64_t count_, distance_;
  Counter* counters_;
};

// It runs what it is given on the thread that gives it. It stands here, not in executor.h, because code of a header
// belongs to one instruction set by its name.
inline constexpr Executor kOnCaller{
    1, [](const Executor&, void (*task)(void* context, int worker), void* context) { task(context, 0); }};

// Heads that need nothing of each other go through phases. Where there are enough of them for the threads, each is one
// thread's, which waits for nobody; else, or where heads share much memory, all threads go through the phases of all
// heads together.
class HeadsInPhases {
  static constexpr std::int64_t kMostBytes = 64 << 20;  // of the heads that threads are at, each on its own

 public:
  // A head alone would take about so many bytes.
  HeadsInPhases(std::int64_t heads, const Executor& executor, std::int64_t bytes)
      : heads_(heads),
        executor_(executor),
        apart_(keeps_busy(heads, executor.threads) && executor.threads * bytes <= kMostBytes) {}

  std::int64_t together() const { return apart_ ? 1 : heads_; }

  std::int64_t workspace_bytes(std::int64_t shared_bytes, std::int64_t worker_bytes) const {
    return (apart_ ? executor_.threads : 1) * shared_bytes + executor_.threads * worker_bytes;
  }

  // It calls task(first, executor, shared, workers) for heads first .. first + together() - 1. They share memory, and
  // each worker of the executor has some of its own.
  template <class Task>
  void run(char* workspace, std::int64_t shared_bytes, std::int64_t worker_bytes, const Task& task) const {
    if (!apart_) return task(0, executor_, workspace, workspace + shared_bytes);
    for_each_unit(executor_, heads_, workspace, shared_bytes + worker_bytes,
                  [&](std::int64_t head, char* memory) { task(head, kOnCaller, memory, memory + shared_bytes); });
  }

 private:
  std::int64_t heads_;
  const Executor& executor_;
  bool apart_;
};

}  // namespace attnx::cpu::ATTNX_ISA
