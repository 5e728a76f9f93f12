// This makes the map of sparse-linear attention: means of blocks, their products, and labels by these. A map has at
// least one label.
#pragma once

#include <cstddef>

#include "attnx/block_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

std::size_t block_map_workspace(const BlockMapParams& params, const Launch& launch);
void block_map(const BlockMapParams& params, const Launch& launch);

// This makes the products alone, in the same workspace. It is a hook for the test of their accuracy. They are [batch,
// heads_q, query blocks, key blocks], rows padded to a multiple of 4.
void block_products(const BlockMapParams& params, float* products, const Launch& launch);

}  // namespace attnx::cuda
