// This file registers the operators for what routing's centroids follow: which is nearest to a row, sums of these rows,
// and their moving average.
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "route_rows.h"

namespace attnx::ops {

namespace {

struct RowsAndCentroids {
  StableTensor rows, centroids;
  ATTNX_FIELDS(rows, centroids)
};

StableTensor nearest_centroids(const RowsAndCentroids& x, const LengthsOfRows& lengths) {
  RouteParams p = read_rows("rows", x.rows, x.centroids);
  p.sequences = read_lengths("seqused", lengths.seqused, "leftpad", lengths.leftpad, p);
  return find_nearest(p, x.rows);
}

struct Statistics {
  StableTensor sums, members;
  ATTNX_FIELDS(sums, members)
};

// Queries and keys count half each.
Statistics centroid_sums(const RoutedRows& x, const RowLengths& lengths) {
  check_heads(x);
  const StableTensor& centroids = x.centroids;
  const std::vector shape{centroids.size(0), centroids.size(1)};
  const StableTensor sums = make_zeros(centroids, centroids.sizes(), ScalarType::Double);
  const StableTensor counts = make_zeros(centroids, shape, ScalarType::Double);
  for (const auto& [name, rows] : {std::pair("query", &x.query), std::pair("key", &x.key)}) {
    CentroidSumsParams p{read_rows(name, *rows, centroids)};
    p.sequences = read_lengths(name, lengths, p);
    const StableTensor nearest = find_nearest(p, *rows);
    p.nearest = data<std::int32_t>(nearest);
    p.sums = data<double>(sums);
    p.counts = data<double>(counts);
    run(p, {kRouting, *rows});
  }
  const auto half = [&](const StableTensor& whole) {
    StableTensor result = make_empty(whole, whole.sizes(), ScalarType::Float);
    run(HalveSumsParams{.count = whole.numel(), .sums = data<double>(whole), .halves = data<float>(result)},
        {kRouting, centroids});
    return result;
  };
  return {half(sums), half(counts)};
}

struct Averages {
  MutableTensor centroids, counts;
  StableTensor sums, members;
  double decay;
  ATTNX_FIELDS(centroids, counts, sums, members, decay)
};

void update_centroids(const Averages& a) {
  check(a.decay >= 0 && a.decay <= 1, "decay: expected from 0 to 1, got ", a.decay);
  check_dtype("centroids", a.centroids, ScalarType::Float, "");
  check(a.centroids.dim() == 3, "centroids: expected shape (heads, clusters, head_dim), got ", shape_of(a.centroids));
  const std::int64_t heads = a.centroids.size(0), clusters = a.centroids.size(1), dim = a.centroids.size(2);
  const auto read = [&](const char* name, const StableTensor& x, std::initializer_list<std::int64_t> shape) {
    check_dtype(name, x, ScalarType::Float, "");
    check_shape(name, x, shape);
    check_contiguous(name, x);
    return data<float>(x);
  };
  const auto read_counts = [&](const char* name, const StableTensor& x) {
    float* const counts = read(name, x, {heads, clusters});
    if (const auto values = values_on_host(x))
      for (std::int64_t i = 0; i < heads * clusters; ++i) {
        const float count = data<const float>(*values)[i];
        check(count >= 0 && std::isfinite(count), name, ": expected finite numbers of 0 or more, got ", count);
      }
    return counts;
  };
  run(UpdateCentroidsParams{.heads = heads,
                            .clusters = clusters,
                            .head_dim = dim,
                            .decay = a.decay,
                            .sums = read("sums", a.sums, {heads, clusters, dim}),
                            .members = read_counts("members", a.members),
                            .centroids = read("centroids", a.centroids, {heads, clusters, dim}),
                            .counts = read_counts("counts", a.counts)},
      {kRouting, a.centroids});
}

const Registration registration(kRouting, OnHost::kRefused,
                                {define<nearest_centroids>("nearest_centroids"),
                                 define<centroid_sums>("centroid_sums")});
const Registration update_registration(kRouting, OnHost::kServed, {define<update_centroids>("update_centroids_")});

}  // namespace

}  // namespace attnx::ops
