// This draws the blocks of a round of probabilistic attention as lists, and as transposed lists.
#pragma once

#include <cstddef>

#include "attnx/block_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

std::size_t sample_blocks_workspace(const SampleBlocksParams& params, const Launch& launch);

// It reads seed and offset on the device, so that a captured graph draws another round when they change.
void sample_blocks(const SampleBlocksParams& params, const Launch& launch);

}  // namespace attnx::cuda
