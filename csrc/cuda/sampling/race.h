// This pass finds where the race of each row of blocks ends, of which a fixed number is kept.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sampling/round.h"

namespace attnx::cuda {

// It sets round.finishes, for rows of which so many blocks are kept, diagonal ones included.
void launch_race(const Round& round, std::int64_t blocks_per_row, cudaStream_t stream);

}  // namespace attnx::cuda
