// These are the tiles of the clusters of routing attention: a tile of rows belongs to one cluster, and sees its keys,
// the learned ones of the memory first. Keys count from the start of their cluster, so that they fall into the same
// tiles whatever clusters there are besides.
#pragma once

#include "cuda/common/logits.h"
#include "cuda/tiles/band.h"
#include "cuda/tiles/cluster_tile.h"

namespace attnx::cuda {

struct ClusterBand : Band {
  const std::int32_t* ends;  // [length_q]: how many keys a query sees; null: all
  int length_q;

  // Rows behind the last query see nothing.
  __device__ __forceinline__ Visible visible(int query) const {
    return {0, query >= length_q ? 0 : ends ? __ldg(ends + query) : length_k};
  }
  // Queries stand in the order of time.
  __device__ __forceinline__ Visible seen_by_all(int first_query, int) const { return visible(first_query); }
};

struct ClusterSequence {
  int cluster, length_q, first_row_tile;
  std::int64_t first_q, first_k;  // slots before it, of the head
  ClusterBand band;
};

__device__ __forceinline__ ClusterTile read_tile(const ClusterTile* tile) {
  const auto* entry = reinterpret_cast<const int4*>(tile);
  const int4 low = __ldg(entry), high = __ldg(entry + 1);
  return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}

__device__ __forceinline__ ClusterSequence cluster_sequence(const ClusterTable& clusters, const ClusterTile& tile) {
  const std::int32_t* ends = clusters.ends ? clusters.ends + tile.head * clusters.slots + tile.first_q : nullptr;
  return {tile.cluster, tile.length_q, tile.first_row_tile,
          tile.first_q, tile.first_k,  {{tile.length_k, 0, kUnbounded, kUnbounded}, ends, tile.length_q}};
}

// This says which tile of rows a block owns, as ForwardPlace does.
struct ClusterPlace {
  int split, query_block, head, batch;
  ClusterSequence sequence;
  int row_begin, row_end;

  template <class Args, class Tile>
  static __device__ __forceinline__ ClusterPlace of(const Args& args, int block, Tile) {
    const ClusterTile tile = read_tile(args.tiles.table + block);
    ClusterPlace place{};
    if (tile.head < 0) return place;
    place.sequence = cluster_sequence(args.tiles, tile);
    place.head = tile.head;
    place.batch = args.heads.divide(tile.head);
    place.head -= place.batch * args.heads.divisor();
    place.query_block = tile.begin / Tile::kM;
    place.row_begin = tile.begin;
    place.row_end = tile.length_q;
    return place;
  }
};

// This says which tile of keys a block of the backward owns.
struct ClusterKeyPlace {
  int key_begin, head, batch;
  ClusterSequence sequence;

  template <class Args, class Tile>
  static __device__ __forceinline__ ClusterKeyPlace of(const Args& args, int block, Tile) {
    const ClusterTile tile = read_tile(args.tiles.table + block);
    if (tile.head < 0) return {};
    const int batch = args.heads.divide(tile.head);
    return {tile.begin, tile.head - batch * args.heads.divisor(), batch, cluster_sequence(args.tiles, tile)};
  }
};

// This turns s into s * multiplier, or -inf where the query does not see the key. Clusters have no distances,
// and each query head has its own.
template <class Args, int kM, int kN>
__device__ __forceinline__ void place_logits(float (&s)[kM][kN][4], const Args&, const ClusterBand& band, int, int row,
                                             int key, float multiplier) {
#pragma unroll
  for (int r = 0; r < kM * 2; ++r) {
    const int end = band.visible(row + row_of(r)).end - key;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[r / 2][n][r % 2 * 2 + e];
        x = n * 8 + e < end ? x * multiplier : -INFINITY;
      }
  }
}

// This does the same where s is transposed: its rows are keys, and its columns are rows.
template <class Args, int kM, int kN>
__device__ __forceinline__ void place_transposed_logits(float (&s)[kM][kN][4], const Args& args,
                                                        const ClusterBand& band, int, int key, int row) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int end = band.visible(row + n * 8 + e).end - key;
#pragma unroll
      for (int r = 0; r < kM * 2; ++r) {
        float& x = s[r / 2][n][r % 2 * 2 + e];
        x = row_of(r) < end ? x * args.scale_log2 : -INFINITY;
      }
    }
}

// This is the tiles policy.
struct Clustered {
  static constexpr bool kPerHead = true;
  static constexpr bool kFromMemory = false;
  // A table says which tile a block owns.
  static constexpr bool kHasPlaces = true;
  static constexpr bool kHasBias = false;
  static constexpr bool kHasAddend = false;

  using Place = ClusterPlace;
  using KeyPlace = ClusterKeyPlace;

  using ForwardParameters = ClusterTable;   // its tiles are of rows
  using BackwardParameters = ClusterTable;  // its tiles are of keys

  template <class Tile, class Args>
  static __device__ __forceinline__ BandTiles<Tile::kN> keys(const Args&, const ClusterPlace& place) {
    const int last_row = min(place.row_begin + Tile::kM, place.row_end) - 1;
    return {0, (place.sequence.band.visible(last_row).end + Tile::kN - 1) / Tile::kN};
  }

  // Queries see more keys the later they are.
  template <class Tile, class Args>
  static __device__ __forceinline__ BandTiles<Tile::kM> rows(const Args&, const ClusterSequence& sequence, int, int,
                                                             int key_begin) {
    const int tiles = (sequence.length_q + Tile::kM - 1) / Tile::kM;
    int low = 0, high = tiles;  // tiles before low do not see the first key, tiles from high on do
    while (low < high) {
      const int middle = (low + high) / 2, last_row = min((middle + 1) * Tile::kM, sequence.length_q) - 1;
      if (sequence.band.visible(last_row).end <= key_begin) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return {low, tiles};
  }

  template <int kKeys, class Args, int kRows>
  static __device__ __forceinline__ int before(const Args&, const ClusterBand&, int, int key_begin,
                                               const BandTiles<kRows>&, int) {
    return key_begin / kKeys;
  }
};

}  // namespace attnx::cuda
