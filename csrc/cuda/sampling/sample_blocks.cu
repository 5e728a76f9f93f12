#include "sample_blocks.h"

#include "cuda/common/device.h"
#include "cuda/dispatch/range.h"
#include "cuda/sampling/race.h"

namespace attnx::cuda {

namespace {

constexpr int kWarps = 4;

// No block of queries before this one, a multiple of 32, sees a block of keys.
__device__ __forceinline__ int first_row(const BlockGrid& grid, int j) {
  const int position = j * int(grid.block_k) - int(grid.length_k - grid.length_q);
  return grid.is_causal && position > 0 ? position / int(grid.block_q) / 32 * 32 : 0;
}

}  // namespace

// A warp makes a list: that of a block of queries or, transposed, of keys. Nine thread blocks of 56 registers fit a
// multiprocessor.
template <bool kTransposed>
__global__ void __launch_bounds__(kWarps * 32, 9)
    attnx_sample_blocks(const __grid_constant__ Round round, const __grid_constant__ SampledLists lists) {
  const int query_blocks = int(round.grid.query_blocks()), key_blocks = int(round.grid.key_blocks());
  const int rows = kTransposed ? key_blocks : query_blocks, width = kTransposed ? query_blocks : key_blocks;
  const std::int64_t number = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (number >= round.heads * rows) return;
  const std::int64_t head = number / rows;
  const int own = int(number - head * rows);
  const int2 lengths = round.own_lengths(head);
  const SamplingRound draws = round.draws();
  lists.write(number, kTransposed ? first_row(round.grid_of(lengths), own) : 0, width, [&](int other, float& p) {
    const int i = kTransposed ? other : own, j = kTransposed ? own : other;
    const BlockRow<int> row(round.grid_of(lengths), i);
    if (j >= row.candidates) return false;
    const int distance = row.distance(j);
    p = __ldg(round.keep + distance);
    return round.finishes ? Round::keeps(draws, head, i, j, p, distance, round.finishes[head * query_blocks + i])
                          : Round::keeps(draws, head, i, j, p);
  });
}

std::size_t sample_blocks_workspace(const SampleBlocksParams& p, const Launch&) {
  return p.blocks_per_row == 0 ? 0 : std::size_t(p.heads * p.grid.query_blocks()) * sizeof(Finish);
}

void sample_blocks(const SampleBlocksParams& p, const Launch& where) {
  const Range range("attnx::sample_blocks");
  const auto stream = static_cast<cudaStream_t>(where.stream);
  const Round round{.grid = p.grid,
                    .lengths = p.lengths,
                    .heads = p.heads,
                    .sequence_heads = p.sequence_heads,
                    .keep = p.keep,
                    .seed = p.seed,
                    .offset = p.offset,
                    .finishes = p.blocks_per_row == 0 ? nullptr : static_cast<Finish*>(where.workspace)};
  const auto launch = [&](auto* kernel, std::int64_t rows, const SampledLists& lists) {
    launch_kernel("attnx_sample_blocks", kernel, (p.heads * rows + kWarps - 1) / kWarps, kWarps * 32, 0, stream, round,
                  lists);
  };
  const SampledLists lists{p.counts, p.indices, p.corrections, p.logarithm};
  if (round.finishes) {
    launch_race(round, p.blocks_per_row, lists, stream);
  } else {
    launch(attnx_sample_blocks<false>, p.grid.query_blocks(), lists);
  }
  if (p.query_counts)
    launch(attnx_sample_blocks<true>, p.grid.key_blocks(),
           {p.query_counts, p.query_indices, p.query_corrections, p.logarithm});
}

}  // namespace attnx::cuda
