// These are the tile sizes of calls with tables by distance, whose numbers need the registers of a narrow tile.
#pragma once

#include "cuda/mainloop/sm80/tile_sizes.h"

namespace attnx::cuda {

template <int kHeadDim>
struct TablesForwardTiles {
  using Narrow = ForwardTile<kHeadDim, 64, kHeadDim <= 128 ? 64 : 32, 4, kHeadDim == 128 ? 1 : 2, 2>;
  using Wide = Narrow;
  using WideListed = Narrow;
};

template <int kHeadDim>
using TablesBackwardTiles = TermsBackwardTiles<kHeadDim>;

// Gradients of logits take the tiles of GradTerms.
template <int kHeadDim>
struct TablesSumsTile {
  using Tile = typename SumsTiles<kHeadDim>::GradTerms;
};
template <>
struct TablesSumsTile<64> {
  using Tile = SumsTile<64, 64, 64, 1, 4, 1, 2, 2, 2>;
};

}  // namespace attnx::cuda
