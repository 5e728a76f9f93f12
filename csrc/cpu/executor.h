// A kernel gets its threads from whoever calls it.
#pragma once

namespace attnx::cpu {

// It runs task(context, worker) for worker 0 .. threads - 1, on as many threads or on fewer, one after the other.
struct Executor {
  int threads;
  void (*start)(const Executor& self, void (*task)(void* context, int worker), void* context);
  void* state = nullptr;  // of the function

  template <class Task>
  void run(const Task& task) const {
    start(
        *this, [](void* context, int worker) { (*static_cast<const Task*>(context))(worker); },
        const_cast<void*>(static_cast<const void*>(&task)));
  }
};

}  // namespace attnx::cpu
