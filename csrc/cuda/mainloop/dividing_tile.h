// This chooses among tile sizes for lists. It is plain C++, because the launchers compute with it too.
#pragma once

#include <cstdint>

namespace attnx::cuda {

// This tells whether rows and keys of a tile divide a block.
template <class Tile>
bool divides(std::int64_t block_q, std::int64_t block_k) {
  return block_q % Tile::kM == 0 && block_k % Tile::kN == 0;
}

// These are tiles, the largest first, of which the first serves whose rows and keys divide a block. The last one
// divides every block.
template <class Tile, class... Smaller>
struct DividingTile {
  // This calls action(tile) for it.
  template <class Action>
  static auto choose(std::int64_t block_q, std::int64_t block_k, const Action& action) {
    if constexpr (sizeof...(Smaller) > 0) {
      if (!divides<Tile>(block_q, block_k)) return DividingTile<Smaller...>::choose(block_q, block_k, action);
    }
    return action(Tile());
  }
};

}  // namespace attnx::cuda
