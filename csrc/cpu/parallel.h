// Ranges are dealt to the threads of an executor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "executor.h"

namespace attnx::cpu {

// It calls task(begin, end) on parts of [0, count), none of which is shorter than `grain` unless count is.
template <class Task>
void parallel_for(Executor executor, std::int64_t count, std::int64_t grain, const Task& task) {
  const std::int64_t parts = std::clamp<std::int64_t>(count / grain, 1, executor.threads);
  executor.threads = int(parts);
  executor.run([&](int part) { task(count * part / parts, count * (part + 1) / parts); });
}

}  // namespace attnx::cpu
