// This file registers torch.ops.attnx.route, which tells which rows of each head form clusters around its centroids,
// and the operators for what the centroids follow. The method is that of Roy et al., arXiv 2003.05997.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "arguments.h"
#include "attnx/capability.h"

namespace attnx::ops {

namespace {

constexpr const char* kSystem = "routing_attention";

struct Rows {
  StableTensor query, key, centroids;
  ATTNX_FIELDS(query, key, centroids)
};

struct ClusterSizes {
  SymInt cluster_size_q, cluster_size_k;
  ATTNX_FIELDS(cluster_size_q, cluster_size_k)
};

struct RouteOptions {
  std::string routing;
  bool shared_qk;
  ATTNX_FIELDS(routing, shared_qk)
};

// Indices are (batch, heads, slots), and offsets (batch, heads, clusters + 1). Slots that a head does not use hold 0.
struct Routes {
  StableTensor query_indices, query_offsets, key_indices, key_offsets;
  ATTNX_FIELDS(query_indices, query_offsets, key_indices, key_offsets)
};

// It reads rows and the centroids that they are compared with, which belong to the heads of queries.
RouteParams read_rows(std::string_view name, const StableTensor& rows, const StableTensor& centroids) {
  const Capability& row = Target{kSystem, rows}.capability();
  check(rows.dim() == 4, name, ": expected 4 dimensions, (batch, heads, length, head_dim), got shape ", shape_of(rows));
  check(lists(row.dtypes, dtype_of(rows)), name, ": expected one of ", row.dtypes, ", got ", dtype_of(rows));
  check_layout(name, rows);
  check(rows.size(1) >= 1 && rows.size(3) >= row.head_dim_min && rows.size(3) <= row.head_dim_max, name,
        ": expected a head or more and head_dim from ", row.head_dim_min, " to ", row.head_dim_max, ", got shape ",
        shape_of(rows));
  check(rows.size(2) <= std::numeric_limits<std::int32_t>::max(), name, ": expected at most 2147483647 rows, got ",
        rows.size(2));
  check_dtype("centroids", centroids, ScalarType::Float, "");
  check(centroids.dim() == 3 && centroids.size(0) >= 1 && centroids.size(0) % rows.size(1) == 0 &&
            centroids.size(1) >= 1 && centroids.size(2) == rows.size(3),
        "centroids: expected shape (heads of query, clusters, ", rows.size(3), ") for ", name, " of shape ",
        shape_of(rows), ", got ", shape_of(centroids));
  check_contiguous("centroids", centroids);
  RouteParams p;
  p.dtype = to_dtype(rows.scalar_type());
  p.batch = rows.size(0);
  p.heads = centroids.size(0);
  p.length = rows.size(2);
  p.head_dim = rows.size(3);
  p.group = p.heads / rows.size(1);
  p.rows = view_rows(rows);
  p.clusters = centroids.size(1);
  p.centroids = data<const float>(centroids);
  return p;
}

void check_heads(const Rows& x) {
  const auto& [query, key, centroids] = x;
  check(query.dim() == 4 && key.dim() == 4, "query, key: expected 4 dimensions, (batch, heads, length, head_dim), got ",
        shape_of(query), " and ", shape_of(key));
  check_dtype("key", key, query.scalar_type(), " like query");
  check(key.size(1) >= 1 && query.size(1) % key.size(1) == 0, "query: expected heads to be a multiple of the ",
        key.size(1), " heads of key, got ", query.size(1));
  check_shape("key", key, {query.size(0), key.size(1), key.size(2), query.size(3)});
  check(centroids.dim() == 3 && centroids.size(0) == query.size(1) && centroids.size(2) == query.size(3),
        "centroids: expected shape (", query.size(1), ", clusters, ", query.size(3), "), got ", shape_of(centroids));
}

StableTensor empty_ints(const StableTensor& like, const std::vector<std::int64_t>& shape) {
  return make_empty(like, shape, ScalarType::Int);
}

StableTensor find_nearest(const RouteParams& route, const StableTensor& rows) {
  NearestParams p{route};
  const StableTensor result = empty_ints(rows, {p.batch, p.heads, p.length});
  p.nearest = data<std::int32_t>(result);
  run(p, {kSystem, rows});
  return result;
}

using Lists = std::pair<StableTensor, StableTensor>;

Lists balanced(const RouteParams& route, const StableTensor& rows, std::int64_t cluster_size) {
  SelectParams p{route};
  p.cluster_size = std::min(cluster_size, p.length);
  const std::int64_t slots = p.clusters * p.cluster_size;
  check(slots <= std::numeric_limits<std::int32_t>::max(), "cluster_size: expected at most ",
        std::numeric_limits<std::int32_t>::max() / p.clusters, " for ", p.clusters, " clusters, got ", cluster_size);
  const StableTensor indices = empty_ints(rows, {p.batch, p.heads, slots});
  const StableTensor offsets = empty_ints(rows, {p.batch, p.heads, p.clusters + 1});
  const StableTensor counts = empty_ints(rows, {p.batch, p.heads, p.clusters});
  p.indices = data<std::int32_t>(indices);
  p.counts = data<std::int32_t>(counts);
  run(p, {kSystem, rows});
  run(CompactClustersParams{.heads = p.batch * p.heads,
                            .clusters = p.clusters,
                            .cluster_size = p.cluster_size,
                            .counts = p.counts,
                            .indices = p.indices,
                            .offsets = data<std::int32_t>(offsets)},
      {kSystem, rows});
  return {indices, offsets};
}

Lists ragged(const RouteParams& p, const StableTensor& rows) {
  const StableTensor nearest = find_nearest(p, rows);
  const StableTensor indices = empty_ints(rows, {p.batch, p.heads, p.length});
  const StableTensor offsets = empty_ints(rows, {p.batch, p.heads, p.clusters + 1});
  run(SortByClusterParams{.heads = p.batch * p.heads,
                          .length = p.length,
                          .clusters = p.clusters,
                          .nearest = data<std::int32_t>(nearest),
                          .indices = data<std::int32_t>(indices),
                          .offsets = data<std::int32_t>(offsets)},
      {kSystem, rows});
  return {indices, offsets};
}

Routes route(const Rows& x, const ClusterSizes& sizes, const RouteOptions& options) {
  const auto& [routing, shared_qk] = options;
  check(routing == "topk" || routing == "argmax", "routing: expected topk or argmax, got ", routing);
  check_heads(x);
  check(!shared_qk || x.query.size(2) == x.key.size(2),
        "shared_qk: expected False where query and key differ in length, got True with ", x.query.size(2), " and ",
        x.key.size(2));
  for (const std::int64_t size : {sizes.cluster_size_q.value, sizes.cluster_size_k.value})
    check(size >= 1 || routing == "argmax", "cluster_size: expected 1 or more, got ", size);
  const auto lists_of = [&](const char* name, const StableTensor& rows, std::int64_t size) {
    const RouteParams p = read_rows(name, rows, x.centroids);
    return options.routing == "topk" ? balanced(p, rows, size) : ragged(p, rows);
  };
  const auto [query_indices, query_offsets] = lists_of("query", x.query, sizes.cluster_size_q);
  if (shared_qk) return {query_indices, query_offsets, empty_ints(x.query, {0}), empty_ints(x.query, {0})};
  const auto [key_indices, key_offsets] = lists_of("key", x.key, sizes.cluster_size_k);
  return {query_indices, query_offsets, key_indices, key_offsets};
}

struct RowsAndCentroids {
  StableTensor rows, centroids;
  ATTNX_FIELDS(rows, centroids)
};

StableTensor nearest_centroids(const RowsAndCentroids& x) {
  return find_nearest(read_rows("rows", x.rows, x.centroids), x.rows);
}

struct Statistics {
  StableTensor sums, members;
  ATTNX_FIELDS(sums, members)
};

// Queries and keys count half each.
Statistics centroid_sums(const Rows& x) {
  check_heads(x);
  const StableTensor& centroids = x.centroids;
  const std::vector shape{centroids.size(0), centroids.size(1)};
  const StableTensor sums = make_zeros(centroids, centroids.sizes(), ScalarType::Double);
  const StableTensor counts = make_zeros(centroids, shape, ScalarType::Double);
  for (const auto& [name, rows] : {std::pair("query", &x.query), std::pair("key", &x.key)}) {
    CentroidSumsParams p{read_rows(name, *rows, centroids)};
    const StableTensor nearest = find_nearest(p, *rows);
    p.nearest = data<std::int32_t>(nearest);
    p.sums = data<double>(sums);
    p.counts = data<double>(counts);
    run(p, {kSystem, *rows});
  }
  const auto half = [&](const StableTensor& whole) {
    StableTensor result = make_empty(whole, whole.sizes(), ScalarType::Float);
    run(HalveSumsParams{.count = whole.numel(), .sums = data<double>(whole), .halves = data<float>(result)},
        {kSystem, centroids});
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
      {kSystem, a.centroids});
}

const Registration registration(kSystem, OnHost::kRefused,
                                {define<route>("route"), define<nearest_centroids>("nearest_centroids"),
                                 define<centroid_sums>("centroid_sums")});
const Registration update_registration(kSystem, OnHost::kServed, {define<update_centroids>("update_centroids_")});

}  // namespace

}  // namespace attnx::ops
