// This draws the blocks of a round of probabilistic attention, and computes what makes up for the others.
#include <cmath>
#include <utility>
#include <vector>

#include "attention.h"
#include "parallel.h"

namespace attnx::cpu {

namespace {

// It writes the kept blocks of row i of a head, ascending, and returns how many they are.
std::int32_t sample_row(const SampleBlocksParams& p, const SamplingRound& round, const BlockRow<>& row,
                        std::int64_t head, std::int64_t i, std::int32_t* kept) {
  std::int32_t* end = kept;
  if (p.blocks_per_row == 0) {
    for (std::int64_t j = 0; j < row.candidates; ++j)
      if (is_kept(round.draw(head, i, j), p.keep[row.distance(j)])) *end++ = std::int32_t(j);
    return std::int32_t(end - kept);
  }
  std::vector<std::pair<double, std::int32_t>> others;
  for (std::int64_t j = 0; j < row.candidates; ++j) {
    const std::int64_t distance = row.distance(j);
    if (distance == 0) {
      *end++ = std::int32_t(j);
    } else if (p.keep[distance] > 0) {
      others.emplace_back(arrival_time(round.draw(head, i, j), p.keep[distance]), std::int32_t(j));
    }
  }
  const std::int64_t places = std::max<std::int64_t>(p.blocks_per_row - (end - kept), 0);
  const auto first = others.begin(), last = first + std::min<std::int64_t>(places, std::int64_t(others.size()));
  std::nth_element(first, last, others.end());
  end = std::transform(first, last, end, [](const auto& other) { return other.second; });
  std::sort(kept, end);
  return std::int32_t(end - kept);
}

// It calls task(head, row, number of the row over all heads), on all threads.
template <class Task>
void for_each_row(const BlockGrid& grid, std::int64_t heads, const Executor& executor, const Task& task) {
  constexpr std::int64_t kBlocksOfPart = 4096;
  const std::int64_t rows = grid.query_blocks(), width = std::max<std::int64_t>(grid.key_blocks(), 1);
  parallel_for(executor, heads * rows, std::max<std::int64_t>(kBlocksOfPart / width, 1),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t r = begin; r < end; ++r) task(r / rows, r % rows, r);
               });
}

}  // namespace

void sample_blocks(const SampleBlocksParams& p, const Executor& executor) {
  const SamplingRound round{std::uint64_t(*p.seed), std::uint32_t(*p.offset)};
  const std::int64_t width = p.grid.key_blocks();
  for_each_row(p.grid, p.heads, executor, [&](std::int64_t head, std::int64_t i, std::int64_t r) {
    const BlockRow<> row(p.lengths.own(p.grid, head / p.sequence_heads), i);
    std::int32_t* kept = p.indices + r * width;
    p.counts[r] = sample_row(p, round, row, head, i, kept);
    std::fill(kept + p.counts[r], kept + width, 0);
    if (!p.corrections) return;
    std::transform(kept, kept + p.counts[r], p.corrections + r * width, [&](std::int32_t j) {
      const float probability = p.keep[row.distance(j)];
      return p.logarithm ? -std::log(probability) : probability;
    });
  });
}

}  // namespace attnx::cpu
