// These are routing's entry points: which rows form clusters around centroids, and what the centroids follow. Each
// function enqueues its kernels and returns.
#pragma once

#include <cstddef>

#include "attnx/cluster_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

std::size_t select_workspace(const SelectParams& params, const Launch& launch);
void select(const SelectParams& params, const Launch& launch);

std::size_t compact_clusters_workspace(const CompactClustersParams& params, const Launch& launch);
void compact_clusters(const CompactClustersParams& params, const Launch& launch);

std::size_t nearest_workspace(const NearestParams& params, const Launch& launch);
void nearest(const NearestParams& params, const Launch& launch);

std::size_t sort_by_cluster_workspace(const SortByClusterParams& params, const Launch& launch);
void sort_by_cluster(const SortByClusterParams& params, const Launch& launch);

std::size_t centroid_sums_workspace(const CentroidSumsParams& params, const Launch& launch);
void centroid_sums(const CentroidSumsParams& params, const Launch& launch);

std::size_t halve_sums_workspace(const HalveSumsParams& params, const Launch& launch);
void halve_sums(const HalveSumsParams& params, const Launch& launch);

std::size_t update_centroids_workspace(const UpdateCentroidsParams& params, const Launch& launch);
void update_centroids(const UpdateCentroidsParams& params, const Launch& launch);

}  // namespace attnx::cuda
