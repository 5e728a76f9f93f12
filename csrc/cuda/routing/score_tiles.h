// Selection and arg-max take scores from here, a tile at a time: what one kernel writes, the next one reads from the L2
// cache.
#pragma once

#include <algorithm>

#include "cuda/dispatch/workspace.h"
#include "cuda/routing/scores.h"

namespace attnx::cuda {

// These are the scores of some problems, each a head of rows, against some of their centroids, for some of the rows.
struct ScoreTile {
  std::int64_t first_problem, problems;  // of the whole batch
  std::int64_t first_centroid, centroids;
  std::int64_t first_row, rows;
  std::int64_t row_stride;  // of scores[problems][centroids][row_stride]
};

class ScoreTiles {
  static constexpr std::int64_t kNumbers = 4 << 20;            // of a tile: 16 MiB, a third of an L2 of 50 MB
  static constexpr std::int64_t kCentroids = 128, kRows = 64;  // multiples of the product's tiles

  const RouteParams& p_;
  WorkspaceLayout layout_;
  std::int64_t heads_, all_centroids_, features_;
  std::int64_t problems_, centroids_, rows_;  // of a tile
  float *normalised_, *padded_, *scores_;

 public:
  // A tile has all rows of a problem and some of its centroids, or all centroids and some of its rows.
  enum class Whole { kRows, kCentroids };

  ScoreTiles(const RouteParams& p, Whole whole, void* workspace)
      : p_(p),
        heads_(p.heads / p.group),
        all_centroids_(p.group * p.clusters),
        features_(padded_to_vectors(p.head_dim)),
        centroids_(all_centroids_),
        rows_(p.length) {
    const auto cut = [](std::int64_t all, std::int64_t other, std::int64_t step) {
      return std::min(all, std::max(kNumbers / std::max<std::int64_t>(other, 1) / step * step, step));
    };
    if (whole == Whole::kRows) centroids_ = cut(all_centroids_, p.length, kCentroids);
    if (whole == Whole::kCentroids) rows_ = cut(p.length, all_centroids_, kRows);
    const std::int64_t numbers = centroids_ * padded_to_vectors(rows_);
    const bool is_whole = centroids_ == all_centroids_ && rows_ == p.length;
    problems_ = is_whole ? std::clamp<std::int64_t>(kNumbers / std::max<std::int64_t>(numbers, 1), 1, heads_) : 1;
    normalised_ = layout_.place<float>(workspace, p.batch * heads_ * p.length * features_);
    padded_ = layout_.place<float>(workspace, p.heads * p.clusters * features_);
    scores_ = layout_.place<float>(workspace, problems_ * numbers);
  }

  std::size_t bytes() const { return layout_.bytes(); }

  // This calls visit(scores, tile) behind the product that makes each tile.
  template <class Visit>
  void for_each(const Launch& launch, const Visit& visit) const {
    if (p_.batch == 0 || p_.length == 0) return;
    normalise_rows(p_, normalised_, launch);
    pad_centroids(p_, padded_, launch);
    for (std::int64_t batch = 0; batch < p_.batch; ++batch)
      for (std::int64_t problem = 0; problem < heads_; problem += problems_)
        for (std::int64_t centroid = 0; centroid < all_centroids_; centroid += centroids_)
          for (std::int64_t row = 0; row < p_.length; row += rows_) {
            ScoreTile tile{batch * heads_ + problem,
                           std::min(problems_, heads_ - problem),
                           centroid,
                           std::min(centroids_, all_centroids_ - centroid),
                           row,
                           std::min(rows_, p_.length - row),
                           0};
            tile.row_stride = padded_to_vectors(tile.rows);
            const std::int64_t row_size = p_.length * features_, centroid_size = all_centroids_ * features_;
            routing_scores({tile.problems,
                            tile.rows,
                            tile.centroids,
                            features_,
                            {normalised_ + tile.first_problem * row_size + row * features_, row_size, features_},
                            {padded_ + problem * centroid_size + centroid * features_, centroid_size, features_},
                            {scores_, tile.centroids * tile.row_stride, tile.row_stride}},
                           launch);
            visit(scores_, tile);
          }
  }
};

}  // namespace attnx::cuda
