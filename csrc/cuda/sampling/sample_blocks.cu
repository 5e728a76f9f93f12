#include "sample_blocks.h"

#include "cuda/common/device.h"
#include "cuda/dispatch/range.h"
#include "cuda/sampling/race.h"

namespace attnx::cuda {

namespace {

constexpr int kWarps = 4;

struct SampledLists {
  std::int32_t *counts, *indices;
  float* corrections;  // null where they are not wanted
  bool logarithm;
};

// No block of queries before this one, a multiple of 32, sees a block of keys.
__device__ __forceinline__ int first_row(const BlockGrid& grid, int j) {
  const int position = j * int(grid.block_k) - int(grid.length_k - grid.length_q);
  return grid.is_causal && position > 0 ? position / int(grid.block_q) / 32 * 32 : 0;
}

}  // namespace

// A warp makes a list: that of a block of queries or, transposed, of keys. A lane draws for one candidate, and the
// ballot says where in the list it comes.
template <bool kTransposed>
__global__ void __launch_bounds__(kWarps * 32)
    attnx_sample_blocks(const __grid_constant__ Round round, const __grid_constant__ SampledLists lists) {
  const int lane = threadIdx.x % 32;
  const int query_blocks = int(round.grid.query_blocks()), key_blocks = int(round.grid.key_blocks());
  const int rows = kTransposed ? key_blocks : query_blocks, width = kTransposed ? query_blocks : key_blocks;
  const std::int64_t number = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (number >= round.heads * rows) return;
  const std::int64_t head = number / rows;
  const int own = int(number - head * rows);
  const SamplingRound draws = round.draws();
  std::int32_t* const indices = lists.indices + number * width;
  float* const corrections = lists.corrections ? lists.corrections + number * width : nullptr;

  int count = 0;
  for (int first = kTransposed ? first_row(round.grid, own) : 0; first < width; first += 32) {
    const int other = first + lane, i = kTransposed ? other : own, j = kTransposed ? own : other;
    bool kept = false;
    float p = 1;
    if (other < width) {
      const BlockRow<int> row(round.grid, i);
      if (j < row.candidates) {
        const int distance = row.distance(j);
        p = __ldg(round.keep + distance);
        kept = round.finishes ? Round::keeps(draws, head, i, j, p, distance, round.finishes[head * query_blocks + i])
                              : Round::keeps(draws, head, i, j, p);
      }
    }
    const unsigned all = __ballot_sync(~0u, kept);
    const int place = count + __popc(all & ((1u << lane) - 1));
    if (kept) {
      indices[place] = other;
      if (corrections) corrections[place] = lists.logarithm ? -logf(p) : p;
    }
    count += __popc(all);
  }
  for (int place = count + lane; place < width; place += 32) indices[place] = 0;
  if (lane == 0) lists.counts[number] = count;
}

std::size_t sample_blocks_workspace(const SampleBlocksParams& p, const Launch&) {
  return p.blocks_per_row == 0 ? 0 : std::size_t(p.heads * p.grid.query_blocks()) * sizeof(Finish);
}

void sample_blocks(const SampleBlocksParams& p, const Launch& where) {
  const Range range("attnx::sample_blocks");
  const auto stream = static_cast<cudaStream_t>(where.stream);
  const Round round{p.grid, p.heads,  p.keep,
                    p.seed, p.offset, p.blocks_per_row == 0 ? nullptr : static_cast<Finish*>(where.workspace)};
  if (round.finishes) launch_race(round, p.blocks_per_row, stream);
  const auto launch = [&](auto* kernel, std::int64_t rows, const SampledLists& lists) {
    launch_kernel("attnx_sample_blocks", kernel, (p.heads * rows + kWarps - 1) / kWarps, kWarps * 32, 0, stream, round,
                  lists);
  };
  launch(attnx_sample_blocks<false>, p.grid.query_blocks(), {p.counts, p.indices, p.corrections, p.logarithm});
  if (p.query_counts)
    launch(attnx_sample_blocks<true>, p.grid.key_blocks(),
           {p.query_counts, p.query_indices, p.query_corrections, p.logarithm});
}

}  // namespace attnx::cuda
