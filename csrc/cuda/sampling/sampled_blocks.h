// This tells what the device draws for every block of a round: it is a hook for the test that the host draws the same.
#pragma once

#include "attnx/block_sampling.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

// It tells of every block (head, i, j) of a round whether it is kept on its own, and when it arrives in the race of a
// fixed number (block_sampling.h); that is infinity where it may not take part. The arrays are in device memory.
void sampled_blocks(const BlockGrid& grid, const SamplingRound& round, const float* keep, std::int64_t heads,
                    std::uint8_t* kept, double* arrival, const Launch& launch);

}  // namespace attnx::cuda
