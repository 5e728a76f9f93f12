// Two kernels that do not depend on each other share a parallel region: who finds no more work in the first goes on
// with the second, so that the threads wait for each other once.
#pragma once

#include <algorithm>
#include <utility>

#include "executor.h"

namespace attnx::cpu {

template <class Second>
class Joined {
 public:
  Joined(const Executor& executor, const Second& second) : executor_(executor), second_(second) {}

  // Each of the kernels gets an executor. The second runs when the first starts its region, as workspaces last until a
  // kernel returns; any more regions that they have are their own.
  template <class First>
  void run(const First& first) {
    first(executor());
    if (!has_started_) second_(executor());
  }

 private:
  struct Region {
    int threads;
    void (*task)(void* context, int worker);
    void* context;

    void run(int worker) const {
      if (worker < threads) task(context, worker);
    }
  };

  Executor executor() {
    return {executor_.threads,
            [](const Executor& self, void (*task)(void*, int), void* context) {
              static_cast<Joined*>(self.state)->start({self.threads, task, context});
            },
            this};
  }

  void start(const Region& region) {
    if (!std::exchange(has_started_, true)) {
      waiting_ = &region;
      second_(executor());
      if (!waiting_) return;
    }
    const Region* const first = std::exchange(waiting_, nullptr);
    Executor all = executor_;
    all.threads = first ? std::max(first->threads, region.threads) : region.threads;
    all.run([&](int worker) {
      if (first && first != &region) first->run(worker);
      region.run(worker);
    });
  }

  const Executor& executor_;
  const Second& second_;
  bool has_started_ = false;
  const Region* waiting_ = nullptr;  // the first kernel's
};

// First and second call a kernel with the executor that they get.
template <class First, class Second>
void run_joined(const Executor& executor, const First& first, const Second& second) {
  Joined(executor, second).run(first);
}

}  // namespace attnx::cpu
