// Calls on one cache take turns: those that change it run alone, and those that read it run together. So each of them
// works on one state, though torch lets other Python threads run meanwhile.
#pragma once

#include <mutex>
#include <shared_mutex>

#include "check.h"

namespace attnx::ops {

// It returns the mutex of the cache with this state. Caches may share one, as a call waits for no other than its own.
std::shared_mutex& mutex_of(const StableTensor& state);

struct ChangingCache : std::unique_lock<std::shared_mutex> {
  explicit ChangingCache(const StableTensor& state) : unique_lock(mutex_of(state)) {}
};
struct ReadingCache : std::shared_lock<std::shared_mutex> {
  explicit ReadingCache(const StableTensor& state) : shared_lock(mutex_of(state)) {}
};

}  // namespace attnx::ops
