// This lists the rows with the highest scores for each centroid: a radix selection finds the lowest score that is
// taken, and how many of the rows that have it; an ordered compaction then lists the rows.
#include <cub/block/block_scan.cuh>

#include "cuda/common/device.h"
#include "cuda/routing/rank.h"
#include "cuda/routing/routing.h"
#include "cuda/routing/score_tiles.h"
#include "cuda/routing/sequence_rows.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 512, kBins = 2048, kBinsOfThread = kBins / kThreads;
constexpr int kRowsOfThread = 4;  // they are read 16 bytes at a time

struct SelectArguments {
  const float* scores;  // [problems][centroids][row_stride]
  std::int64_t row_stride;
  std::int64_t centroids, all_centroids;  // of a problem: in the tile, and in all
  std::int64_t first_centroid;            // of those of all problems
  std::int64_t heads, clusters;           // of an entry of the batch, and of a head for a sequence
  SequenceRows sequences;
  int length, cluster_size;
  std::int32_t *indices, *counts;
};

using Scan = cub::BlockScan<unsigned, kThreads>;

struct SelectMemory {
  Scan::TempStorage scan;
  unsigned histogram[kBins];
  unsigned digit, wanted;
};

// Reads start on 16 bytes.
__device__ __forceinline__ int first_read(RowRange rows) { return rows.begin / kRowsOfThread * kRowsOfThread; }
__device__ __forceinline__ bool has(RowRange rows, int row) {
  return unsigned(row - rows.begin) < unsigned(rows.end - rows.begin);
}

// The ranks of the rows agree with `prefix` where `mask` is set. This finds the digit, of the bits from `shift` on, of
// the wanted-th highest of them, and sets `wanted` to its place among those with this digit. It returns how many there
// are.
__device__ unsigned find_digit(const float4* scores, RowRange rows, std::uint32_t prefix, std::uint32_t mask, int shift,
                               unsigned& wanted, unsigned& digit, SelectMemory& memory) {
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) memory.histogram[bin] = 0;
  __syncthreads();
  for (int first = first_read(rows) + threadIdx.x * kRowsOfThread; first < rows.end;
       first += kThreads * kRowsOfThread) {
    const float4 x = scores[first / kRowsOfThread];
    const float numbers[kRowsOfThread] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const std::uint32_t rank = rank_of(numbers[i]);
      if (has(rows, first + i) && rank != 0 && (rank & mask) == prefix)
        atomicAdd(&memory.histogram[rank >> shift & (kBins - 1)], 1u);
    }
  }
  __syncthreads();
  // Threads have bins from the highest down.
  unsigned own[kBinsOfThread], sum = 0, before, total;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i)
    sum += own[i] = memory.histogram[kBins - 1 - (int(threadIdx.x) * kBinsOfThread + i)];
  Scan(memory.scan).ExclusiveSum(sum, before, total);
  const unsigned sought = min(wanted, total);
  if (before < sought && sought <= before + sum) {
    int i = 0;
    for (; sought > before + own[i]; ++i) before += own[i];
    memory.digit = kBins - 1 - (threadIdx.x * kBinsOfThread + i);
    memory.wanted = sought - before;
  }
  __syncthreads();
  digit = memory.digit;
  wanted = memory.wanted;
  return total;
}

// A block has one centroid, for one sequence.
__global__ void __launch_bounds__(kThreads) attnx_select_rows(const __grid_constant__ SelectArguments args) {
  __shared__ SelectMemory memory;
  const std::int64_t sequences = args.sequences.count, row = blockIdx.x / sequences;
  const int sequence = int(blockIdx.x % sequences);
  const std::int64_t problem = row / args.centroids;
  const std::int64_t centroid = args.first_centroid + problem * args.all_centroids + row % args.centroids;
  const std::int64_t head = centroid / args.clusters;  // of the whole batch
  const std::int64_t cluster = (head * sequences + sequence) * args.clusters + centroid % args.clusters;
  const RowRange rows = rows_of_sequence(args.sequences, head / args.heads, sequence, args.length);
  const auto* scores = reinterpret_cast<const float4*>(args.scores + row * args.row_stride);
  if (threadIdx.x == 0) memory.digit = memory.wanted = 0;

  std::uint32_t lowest = 0, mask = 0;
  unsigned ties = args.cluster_size, count = 0;  // ties: how many rows of the lowest rank are taken
#pragma unroll
  for (const int shift : {21, 10, 0}) {
    constexpr std::uint32_t kAll = ~0u;
    unsigned digit;
    const unsigned found = find_digit(scores, rows, lowest, mask, shift, ties, digit, memory);
    if (mask == 0) count = min(unsigned(args.cluster_size), found);
    lowest |= digit << shift;
    mask = kAll << shift;
  }
  if (threadIdx.x == 0) args.counts[cluster] = int(count);
  if (count == 0) return;

  std::int32_t* const indices = args.indices + cluster * args.cluster_size;
  unsigned above = 0, equal = 0;  // rows before
  for (int begin = first_read(rows); begin < rows.end; begin += kThreads * kRowsOfThread) {
    const int first = begin + threadIdx.x * kRowsOfThread;
    std::uint32_t ranks[kRowsOfThread] = {};
    unsigned own = 0;  // rows above the lowest rank, and rows that have it, in a half each
    if (first < rows.end) {
      const float4 x = scores[first / kRowsOfThread];
      const float numbers[kRowsOfThread] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        ranks[i] = has(rows, first + i) ? rank_of(numbers[i]) : 0;
        own += (ranks[i] > lowest) + (unsigned(ranks[i] == lowest) << 16);
      }
    }
    unsigned before, total;
    __syncthreads();  // the scan's memory is free again
    Scan(memory.scan).ExclusiveSum(own, before, total);
    unsigned above_before = above + (before & 0xFFFF), equal_before = equal + (before >> 16);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const bool is_equal = ranks[i] == lowest;
      if (ranks[i] > lowest || (is_equal && equal_before < ties))
        indices[above_before + min(equal_before, ties)] = first + i;
      above_before += ranks[i] > lowest;
      equal_before += is_equal;
    }
    above += total & 0xFFFF;
    equal += total >> 16;
  }
}

ScoreTiles tiles_of(const SelectParams& p, void* workspace) { return {p, ScoreTiles::Whole::kRows, workspace}; }

}  // namespace

std::size_t select_workspace(const SelectParams& p, const Launch&) { return tiles_of(p, nullptr).bytes(); }

void select(const SelectParams& p, const Launch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (p.length == 0)
    return check(
        cudaMemsetAsync(p.counts, 0, std::size_t(p.batch * p.heads * p.sequences.count * p.clusters) * sizeof *p.counts,
                        stream),
        "cudaMemsetAsync");
  const std::int64_t all_centroids = p.group * p.clusters;
  tiles_of(p, launch.workspace).for_each(launch, [&](const float* scores, const ScoreTile& tile) {
    const SelectArguments args{scores,
                               tile.row_stride,
                               tile.centroids,
                               all_centroids,
                               tile.first_problem * all_centroids + tile.first_centroid,
                               p.heads,
                               p.clusters,
                               p.sequences,
                               int(p.length),
                               int(p.cluster_size),
                               p.indices,
                               p.counts};
    launch_kernel("attnx_select_rows", attnx_select_rows, tile.problems * tile.centroids * p.sequences.count, kThreads,
                  0, stream, args);
  });
}

}  // namespace attnx::cuda
