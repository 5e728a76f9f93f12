// A plan of linear attention with a state says into which tiles of columns and segments of tokens a call falls.
#pragma once

#include "cuda/linear_state/arguments.h"

namespace attnx::cuda {

// The largest chunk and tile whose memory, by bytes(arguments), a block can have.
LinearStateArguments plan_tiles(const LinearStateParams& params, int (*bytes)(const LinearStateArguments&));

// This cuts tokens into segments, of as many units together as the device has room for, each of several chunks.
void plan_segments(LinearStateArguments& args, std::int64_t tokens);

}  // namespace attnx::cuda
