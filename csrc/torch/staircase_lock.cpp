#include "staircase_lock.h"

#include <array>
#include <functional>

namespace attnx::ops {

std::shared_mutex& mutex_of(const StableTensor& state) {
  static std::array<std::shared_mutex, 64> mutexes;
  // What torch allocates lies on 64 bytes, so that lower bits tell nothing.
  return mutexes[std::hash<std::uintptr_t>()(reinterpret_cast<std::uintptr_t>(state.data_ptr()) / 64) % mutexes.size()];
}

}  // namespace attnx::ops
