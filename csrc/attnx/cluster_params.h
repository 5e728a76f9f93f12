// Kernels that work on clusters of rows are told these, besides those that take products with their centroids
// (RouteParams and its kind, params.h).
#pragma once

#include "attnx/params.h"

namespace attnx {

// The kernel puts the lists that SelectParams asks for, which have cluster_size slots for each cluster, end to end: a
// cluster is shorter where its sequence is, or rows are NaN. Slots that a head does not use become 0.
struct CompactClustersParams {
  std::int64_t heads = 0, clusters = 0, cluster_size = 0;  // heads of the whole batch, clusters of all sequences
  std::int64_t slots = 0;                                  // of a head, enough for its lists
  const std::int32_t* lists = nullptr;                     // [heads, clusters, cluster_size]
  const std::int32_t* counts = nullptr;                    // [heads, clusters]
  std::int32_t* indices = nullptr;                         // [heads, slots]
  std::int32_t* offsets = nullptr;                         // [heads, clusters + 1]
};

// The kernel lists the rows of each cluster, ascending, from the cluster of each row; -1 stands for none. Slots that a
// head does not use become 0.
struct SortByClusterParams {
  std::int64_t heads = 0, length = 0, clusters = 0;  // heads of the whole batch
  const std::int32_t* nearest = nullptr;             // [heads, length]
  std::int32_t* indices = nullptr;                   // [heads, length]
  std::int32_t* offsets = nullptr;                   // [heads, clusters + 1]
};

// The kernel halves sums over queries and keys, which each count half in the statistics that centroids follow.
struct HalveSumsParams {
  std::int64_t count = 0;
  const double* sums = nullptr;
  float* halves = nullptr;
};

// A centroid follows the exponential moving average of sums over that of counts, the latter with Laplace smoothing over
// the clusters of a head. A centroid without members keeps its place.
struct UpdateCentroidsParams {
  std::int64_t heads = 0, clusters = 0, head_dim = 0;
  double decay = 0;
  const float* sums = nullptr;     // [heads, clusters, head_dim]
  const float* members = nullptr;  // [heads, clusters]
  float* centroids = nullptr;      // [heads, clusters, head_dim], in place
  float* counts = nullptr;         // [heads, clusters], in place
};

}  // namespace attnx
