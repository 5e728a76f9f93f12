#include "cluster_tiles.h"

#include <cub/block/block_scan.cuh>

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256;

using Scan = cub::BlockScan<int, kThreads>;

__device__ __forceinline__ int tiles_in(int length, int of_tile) { return (length + of_tile - 1) / of_tile; }

// This returns how many keys the tile of rows sees, or how many rows see the tile of keys. Under a causal mask it
// takes queries and keys to be as far apart in time.
__device__ __forceinline__ int work_of(const ClusterTilesArguments& args, const ClusterTile& tile) {
  const std::int64_t begin = tile.begin, length_q = tile.length_q, length_k = tile.length_k;
  if (args.keys_of_tile) return int(args.is_causal ? length_q - length_q * begin / length_k : length_q);
  return int(args.is_causal ? min(begin + args.rows_of_tile, length_q) * length_k / length_q : length_k);
}

// Work is told apart by its exponent and three bits of its mantissa: that is 0 where there is no tile, and the last.
__device__ __forceinline__ std::uint32_t order_key(int work) {
  return 255 - (work > 0 ? (__float_as_uint(float(work)) >> 20) - (127 << 3) + 1 : 0);
}

}  // namespace

// A block has one head, and a thread one cluster at a time.
__global__ void __launch_bounds__(kThreads) attnx_cluster_tiles(const __grid_constant__ ClusterTilesArguments args) {
  __shared__ Scan::TempStorage memory;
  const int head = blockIdx.x;
  const std::int32_t* query_offset = args.query_offsets + std::int64_t(head) * (args.clusters + 1);
  const std::int32_t* key_offset = args.key_offsets + std::int64_t(head) * (args.clusters + 1);
  const std::int64_t first = head * args.tiles;  // of the head's tiles
  const auto write = [&](std::int64_t i, const ClusterTile& tile, int work) {
    args.table[first + i] = tile;
    if (!args.order_keys) return;
    args.order_keys[first + i] = order_key(work);
    args.order_items[first + i] = std::int32_t(first + i);
  };
  int row_tiles = 0, tiles = 0;  // of the clusters before
  for (int begin = 0; begin < args.clusters; begin += kThreads) {
    const int c = begin + threadIdx.x;
    const bool inside = c < args.clusters;
    const int first_q = inside ? query_offset[c] : 0, first_k = inside ? key_offset[c] : 0;
    const int length_q = inside ? query_offset[c + 1] - first_q : 0;
    const int length_k = inside ? key_offset[c + 1] - first_k + args.memory : 0;
    const int own_rows = tiles_in(length_q, args.rows_of_tile);
    const int own = args.keys_of_tile ? tiles_in(length_k, args.keys_of_tile) : own_rows;
    int row_tiles_before, tiles_before, all_row_tiles, all_tiles;
    Scan(memory).ExclusiveSum(own_rows, row_tiles_before, all_row_tiles);
    __syncthreads();
    Scan(memory).ExclusiveSum(own, tiles_before, all_tiles);
    __syncthreads();
    const int of_tile = args.keys_of_tile ? args.keys_of_tile : args.rows_of_tile;
    for (int i = 0; i < own; ++i) {
      const ClusterTile tile{head,     c,       i * of_tile, first_q,
                             length_q, first_k, length_k,    int(head * args.row_tiles) + row_tiles + row_tiles_before};
      write(tiles + tiles_before + i, tile, max(work_of(args, tile), 1));
    }
    row_tiles += all_row_tiles;
    tiles += all_tiles;
  }
  for (std::int64_t i = tiles + threadIdx.x; i < args.tiles; i += kThreads) write(i, {-1, 0, 0, 0, 0, 0, 0, 0}, 0);
}

void launch_cluster_tiles(const ClusterTilesArguments& args, cudaStream_t stream) {
  launch_kernel("attnx_cluster_tiles", attnx_cluster_tiles, args.heads, kThreads, 0, stream, args);
}

// A block has a tile of rows, and a thread a query.
__global__ void __launch_bounds__(kThreads) attnx_cluster_ends(const __grid_constant__ ClusterEndsArguments args) {
  const ClusterTile& tile = args.table[blockIdx.x];
  if (tile.head < 0) return;
  const std::int64_t first = tile.head * args.query_slots + tile.first_q;
  const std::int32_t* keys = args.keys + tile.head * args.key_slots + tile.first_k;
  const std::int64_t lead =
      args.leads ? args.leads[tile.head / args.heads * args.sequences + tile.cluster / args.clusters] : args.lead;
  for (int i = threadIdx.x; i < args.rows_of_tile && tile.begin + i < tile.length_q; i += kThreads) {
    const std::int64_t time = args.queries[first + tile.begin + i] + lead;
    int low = 0, high = tile.length_k - args.memory;  // keys before low are not later, keys from high on are
    while (low < high) {
      const int middle = (low + high) / 2;
      if (keys[middle] <= time) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    args.ends[first + tile.begin + i] = args.memory + low;
  }
}

void launch_cluster_ends(const ClusterEndsArguments& args, cudaStream_t stream) {
  launch_kernel("attnx_cluster_ends", attnx_cluster_ends, args.tiles, kThreads, 0, stream, args);
}

}  // namespace attnx::cuda
