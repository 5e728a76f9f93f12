// These functions make clusters of rows around centroids, and move the centroids that follow them.
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "parallel.h"

namespace attnx::cpu {

namespace {

double operations(const RouteParams& p) {
  return 2.0 * double(p.batch * p.heads * p.length) * double(p.clusters * p.head_dim);
}
double operations(const CentroidSumsParams& p) { return 8.0 * double(p.batch * p.heads * p.length * p.head_dim); }

}  // namespace

void select(const SelectParams& p, const Executor& executor) {
  run(&Kernels::select_workspace, &Kernels::select, p, executor, operations(p));
}

void nearest(const NearestParams& p, const Executor& executor) {
  run(&Kernels::nearest_workspace, &Kernels::nearest, p, executor, operations(p));
}

void centroid_sums(const CentroidSumsParams& p, const Executor& executor) {
  run(&Kernels::centroid_sums_workspace, &Kernels::centroid_sums, p, executor, operations(p));
}

namespace {

// It returns so many heads, of so many steps each, that a thread has at least some thousand steps to do.
std::int64_t heads_of_part(std::int64_t steps) {
  constexpr std::int64_t kStepsOfPart = 16384;
  return std::max<std::int64_t>(kStepsOfPart / std::max<std::int64_t>(steps, 1), 1);
}

}  // namespace

void compact_clusters(const CompactClustersParams& p, const Executor& executor) {
  parallel_for(executor, p.heads, heads_of_part(p.clusters), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = begin; head < end; ++head) {
      std::int32_t* indices = p.indices + head * p.slots;
      std::int32_t* offset = p.offsets + head * (p.clusters + 1);
      offset[0] = 0;
      for (std::int64_t c = 0; c < p.clusters; ++c) {
        const std::int32_t count = p.counts[head * p.clusters + c];
        std::copy_n(p.lists + (head * p.clusters + c) * p.cluster_size, count, indices + offset[c]);
        offset[c + 1] = offset[c] + count;
      }
      std::fill(indices + offset[p.clusters], indices + p.slots, 0);
    }
  });
}

// It counts the rows of each cluster first.
void sort_by_cluster(const SortByClusterParams& p, const Executor& executor) {
  parallel_for(executor, p.heads, heads_of_part(p.length), [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::int32_t> next(std::size_t(p.clusters + 1));
    for (std::int64_t head = begin; head < end; ++head) {
      const std::int32_t* of_row = p.nearest + head * p.length;
      std::int32_t* starts = p.offsets + head * (p.clusters + 1);
      std::fill(starts, starts + p.clusters + 1, 0);
      for (std::int64_t row = 0; row < p.length; ++row)
        if (of_row[row] >= 0) ++starts[of_row[row] + 1];
      for (std::int64_t c = 0; c < p.clusters; ++c) starts[c + 1] += starts[c];
      std::copy(starts, starts + p.clusters + 1, next.begin());
      std::int32_t* indices = p.indices + head * p.length;
      for (std::int64_t row = 0; row < p.length; ++row)
        if (of_row[row] >= 0) indices[next[std::size_t(of_row[row])]++] = std::int32_t(row);
      std::fill(indices + starts[p.clusters], indices + p.length, 0);
    }
  });
}

void halve_sums(const HalveSumsParams& p, const Executor&) {
  std::transform(p.sums, p.sums + p.count, p.halves, [](double x) { return float(0.5 * x); });
}

void update_centroids(const UpdateCentroidsParams& p, const Executor& executor) {
  constexpr double kSmoothing = 1e-5;
  if (p.decay == 1) return;  // nothing moves, and empty counts are not divided by
  parallel_for(executor, p.heads, heads_of_part(p.clusters * p.head_dim), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = begin; head < end; ++head) {
      double total = 0;
      for (std::int64_t c = head * p.clusters; c < (head + 1) * p.clusters; ++c)
        total += p.counts[c] = float(p.decay * p.counts[c] + (1 - p.decay) * p.members[c]);
      for (std::int64_t c = head * p.clusters; c < (head + 1) * p.clusters; ++c) {
        if (p.members[c] == 0) continue;
        const double smoothed = (p.counts[c] + kSmoothing) * total / (total + double(p.clusters) * kSmoothing);
        for (std::int64_t d = c * p.head_dim; d < (c + 1) * p.head_dim; ++d)
          p.centroids[d] += float((1 - p.decay) * (p.sums[d] - p.members[c] * p.centroids[d]) / smoothed);
      }
    }
  });
}

}  // namespace attnx::cpu
