// This pass keeps a fixed number of blocks of each row.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sampling/round.h"
#include "cuda/sampling/sampled_lists.h"

namespace attnx::cuda {

// It sets round.finishes and writes the lists of rows of which so many blocks are kept, diagonal ones included.
void launch_race(const Round& round, std::int64_t blocks_per_row, const SampledLists& lists, cudaStream_t stream);

}  // namespace attnx::cuda
