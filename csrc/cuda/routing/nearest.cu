// This finds the centroid with the highest score for each row, of equals that with the lower index.
#include "cuda/common/device.h"
#include "cuda/routing/rank.h"
#include "cuda/routing/routing.h"
#include "cuda/routing/score_tiles.h"
#include "cuda/routing/sequence_rows.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128;

struct NearestArguments {
  const float* scores;  // [problems * group][clusters][row_stride]
  std::int64_t row_stride, clusters, length;
  int blocks, rows;       // of a head in the tile
  std::int32_t* nearest;  // of the tile's first head and row
  SequenceRows sequences;
  std::int64_t first_head, heads, first_row;  // the tile's first, and heads of an entry of the batch
  bool by_sequence;
};

// A thread has one row of one head.
__global__ void __launch_bounds__(kThreads) attnx_nearest(const __grid_constant__ NearestArguments args) {
  const int row = blockIdx.x % args.blocks * kThreads + threadIdx.x;
  const std::int64_t head = blockIdx.x / args.blocks;
  if (row >= args.rows) return;
  const float* score = args.scores + head * args.clusters * args.row_stride + row;
  std::uint32_t highest = 0;  // that of NaN, which is not taken
  int nearest = -1;
#pragma unroll 8
  for (int c = 0; c < int(args.clusters); ++c) {
    const std::uint32_t rank = rank_of(score[c * args.row_stride]);
    nearest = rank > highest ? c : nearest;
    highest = max(highest, rank);
  }
  const int sequence = sequence_of(args.sequences, (args.first_head + head) / args.heads, args.first_row + row);
  if (sequence < 0) nearest = -1;
  if (args.by_sequence && nearest >= 0) nearest += sequence * int(args.clusters);
  args.nearest[head * args.length + row] = nearest;
}

ScoreTiles tiles_of(const NearestParams& p, void* workspace) { return {p, ScoreTiles::Whole::kCentroids, workspace}; }

}  // namespace

std::size_t nearest_workspace(const NearestParams& p, const Launch&) { return tiles_of(p, nullptr).bytes(); }

void nearest(const NearestParams& p, const Launch& launch) {
  tiles_of(p, launch.workspace).for_each(launch, [&](const float* scores, const ScoreTile& tile) {
    const int blocks = int((tile.rows + kThreads - 1) / kThreads);
    const NearestArguments args{scores,
                                tile.row_stride,
                                p.clusters,
                                p.length,
                                blocks,
                                int(tile.rows),
                                p.nearest + tile.first_problem * p.group * p.length + tile.first_row,
                                p.sequences,
                                tile.first_problem * p.group,
                                p.heads,
                                tile.first_row,
                                p.by_sequence};
    launch_kernel("attnx_nearest", attnx_nearest, tile.problems * p.group * blocks, kThreads, 0,
                  static_cast<cudaStream_t>(launch.stream), args);
  });
}

}  // namespace attnx::cuda
