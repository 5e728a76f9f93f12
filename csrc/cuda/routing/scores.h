// Routing ranks these: products of normalised rows and centroids, accurate to float32. Each function launches one
// kernel.
#pragma once

#include "attnx/params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

// Matrices that are multiplied have rows of so many numbers, or a multiple: these are 16 bytes.
inline constexpr std::int64_t kScoreVector = 4;
constexpr std::int64_t padded_to_vectors(std::int64_t n) {
  return (n + kScoreVector - 1) / kScoreVector * kScoreVector;
}

// This sets normalised[batch][heads / group][length][padded head_dim] to the rows of the call as by LayerNorm without
// scale and bias (eps 1e-5), and to zeros where they are padded. A row with a NaN or an infinity becomes NaN. Rows may
// have any layout in float32, bfloat16 or float16.
void normalise_rows(const RouteParams& params, float* normalised, const Launch& launch);

// This sets padded[heads][clusters][padded head_dim] to the centroids of the call, and to zeros where they are padded.
void pad_centroids(const RouteParams& params, float* padded, const Launch& launch);

struct ScoreMatrix {
  float* data = nullptr;                            // aligned to 16 bytes
  std::int64_t problem_stride = 0, row_stride = 0;  // in numbers, multiples of kScoreVector
};

// This sets scores[i][c][r] = centroids[i][c] . rows[i][r] of each problem i. A problem is a head, or the heads of a
// group: they share rows, and their centroids are one matrix. A call may also have some of the centroids, or some of
// the heads, so that scores can be consumed while they are in the L2 cache.
struct ScoreParams {
  std::int64_t problems = 0, rows = 0, centroids = 0;
  std::int64_t features = 0;    // padded
  ScoreMatrix row_matrix;       // [problems, rows, features]
  ScoreMatrix centroid_matrix;  // [problems, centroids, features]
  ScoreMatrix score_matrix;     // [problems, centroids, padded rows]; what pads is written, too
};
void routing_scores(const ScoreParams& params, const Launch& launch);

}  // namespace attnx::cuda
