// Into how many shares a forward's keys are cut.
#pragma once

#include <cstdint>

namespace attnx::cuda {

// As many shares as fill the device's slots for blocks, where the tiles of rows alone do not: the fewest with at least
// 85 % of the best efficiency of the waves (FlashDecoding).
int choose_splits(std::int64_t tiles, std::int64_t key_tiles, int slots);

}  // namespace attnx::cuda
