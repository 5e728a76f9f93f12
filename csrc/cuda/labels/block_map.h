// This makes the map of sparse-linear attention: means of blocks, their products, and labels by these.
#pragma once

#include <cstddef>

#include "attnx/block_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

std::size_t block_map_workspace(const BlockMapParams& params, const Launch& launch);
void block_map(const BlockMapParams& params, const Launch& launch);

}  // namespace attnx::cuda
