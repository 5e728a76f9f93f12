#include "ordered_tiles.h"

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256, kKeyBits = 8;

}  // namespace

__global__ void __launch_bounds__(kThreads)
    attnx_ordered_tiles(const ClusterTile* from, const std::int32_t* order, ClusterTile* to, std::int64_t count) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n < count) to[n] = from[order[n]];
}

OrderedTiles::OrderedTiles(std::int64_t heads_, std::int64_t tiles_, WorkspaceLayout& layout, void* workspace)
    : heads(heads_),
      tiles(tiles_),
      unordered(layout.place<ClusterTile>(workspace, count())),
      table(layout.place<ClusterTile>(workspace, count())),
      by_work(count(), kKeyBits, layout, workspace) {}

void OrderedTiles::make(const ClusterTilesArguments& clusters, cudaStream_t stream) const {
  if (count() == 0) return;
  ClusterTilesArguments args = clusters;
  args.heads = heads;
  args.tiles = tiles;
  args.table = unordered;
  args.order_keys = by_work.keys[0];
  args.order_items = by_work.items[0];
  launch_cluster_tiles(args, stream);
  const std::int32_t* const order = by_work.sort(stream).items;
  launch_kernel("attnx_ordered_tiles", attnx_ordered_tiles, (count() + kThreads - 1) / kThreads, kThreads, 0, stream,
                static_cast<const ClusterTile*>(unordered), order, table, count());
}

}  // namespace attnx::cuda
