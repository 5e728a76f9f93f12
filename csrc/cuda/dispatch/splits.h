// This decides into how many shares a forward's keys are cut.
#pragma once

#include <cstdint>

namespace attnx::cuda {

// The shares fill the device's slots for blocks, where the tiles of rows alone do not: this returns the fewest shares
// with at least 85 % of the best efficiency of the waves (FlashDecoding).
int choose_splits(std::int64_t tiles, std::int64_t key_tiles, int slots);

}  // namespace attnx::cuda
