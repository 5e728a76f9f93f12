// This makes the gradient of a number per head from those of each sequence.
#pragma once

#include <cstdint>

#include "cuda/common/launch.h"

namespace attnx::cuda {

// This sets to[h] to the sum over b of from[b][h], on device memory.
void sum_over_batch(const double* from, float* to, std::int64_t batch, std::int64_t heads, const Launch& launch);

}  // namespace attnx::cuda
