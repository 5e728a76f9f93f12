// Tiles along a diagonal of the matrix of logits make up a band: the same place in each of them has the same distance
// between query and key. So a block that walks over a band keeps one sum for each place, and adds up those of a
// distance once, at the end. A distance lies in some neighbouring bands.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attnx/host_device.h"

namespace attnx::cuda {

struct DistanceBands {
  int rows, keys;  // of a tile; keys is a multiple of rows
  int row_tiles, count;

  DistanceBands() = default;
  DistanceBands(std::int64_t length_q, std::int64_t length_k, int tile_rows, int tile_keys)
      : rows(tile_rows),
        keys(tile_keys),
        row_tiles(int((length_q + rows - 1) / rows)),
        count(std::max(row_tiles + int((length_k + keys - 1) / keys - 1) * (keys / rows), 0)) {}

  // A band has these sums, of which the last is no distance's.
  ATTNX_HOST_DEVICE int sums() const { return rows + keys; }
  // This is the first key of a tile less its first row, the same for all tiles of a band.
  ATTNX_HOST_DEVICE int offset(int band) const { return (band + 1 - row_tiles) * rows; }
};

}  // namespace attnx::cuda
