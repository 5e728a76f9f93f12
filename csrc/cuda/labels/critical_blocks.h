// This turns the labels of sparse-linear attention into lists of its critical blocks, which the mainloops walk.
#pragma once

#include <cstddef>

#include "attnx/block_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

inline std::size_t critical_blocks_workspace(const CriticalBlocksParams&, const Launch&) { return 0; }
void critical_blocks(const CriticalBlocksParams& params, const Launch& launch);

// This is the kernel of the transposed lists.
void launch_critical_rows(const CriticalBlocksParams& params, const Launch& launch);

}  // namespace attnx::cuda
