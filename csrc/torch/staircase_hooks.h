// Tests ask this of the staircase cache through the Python module.
#pragma once

#include <cstdint>

#include "attnx/api.h"

namespace attnx::ops {

// From now on appends write so many of their units, the keys or the values of a head of a sequence, and then throw, as
// if they had been interrupted there. With -1 appends are whole again.
ATTNX_API void interrupt_staircase_append(std::int64_t units);

}  // namespace attnx::ops
