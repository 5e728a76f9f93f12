// torch.ops.attnx.route: which rows of each head form clusters around its centroids; and what the centroids follow.
// Roy et al., arXiv 2003.05997.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "arguments.h"
#include "attnx/capability.h"
#include "attnx/environment.h"
#include "backend.h"

namespace attnx::ops {

namespace {

// Rows against centroids, which belong to the heads of queries.
void read(const char* name, const StableTensor& rows, const StableTensor& centroids, RouteParams& p) {
  const Capability& row = *find_capability("routing_attention", "cpu");
  check(rows.dim() == 4, name, ": expected 4 dimensions, (batch, heads, length, head_dim), got shape ", shape_of(rows));
  check(lists(row.dtypes, dtype_of(rows)), name, ": expected one of ", row.dtypes, ", got ", dtype_of(rows));
  check_layout(name, rows);
  check(rows.size(1) >= 1 && rows.size(3) >= row.head_dim_min && rows.size(3) <= row.head_dim_max, name,
        ": expected a head or more and head_dim from ", row.head_dim_min, " to ", row.head_dim_max, ", got shape ",
        shape_of(rows));
  check(rows.size(2) <= std::numeric_limits<std::int32_t>::max(), name, ": expected at most 2147483647 rows, got ",
        rows.size(2));
  check_dtype("centroids", centroids, ScalarType::Float, "");
  check_device("centroids", centroids, rows);
  check(centroids.dim() == 3 && centroids.size(0) >= 1 && centroids.size(0) % rows.size(1) == 0 &&
            centroids.size(1) >= 1 && centroids.size(2) == rows.size(3),
        "centroids: expected shape (heads of query, clusters, ", rows.size(3), ") for ", name, " of shape ",
        shape_of(rows), ", got ", shape_of(centroids));
  check(centroids.is_contiguous(), "centroids: expected a contiguous tensor, got one with other strides");
  switch (rows.scalar_type()) {
    case ScalarType::BFloat16: p.dtype = DType::kBFloat16; break;
    case ScalarType::Half: p.dtype = DType::kFloat16; break;
    case ScalarType::Double: p.dtype = DType::kFloat64; break;
    default: p.dtype = DType::kFloat32;
  }
  p.batch = rows.size(0);
  p.heads = centroids.size(0);
  p.length = rows.size(2);
  p.head_dim = rows.size(3);
  p.group = p.heads / rows.size(1);
  p.rows = view_rows(rows);
  p.clusters = centroids.size(1);
  p.centroids = static_cast<const float*>(centroids.data_ptr());
}

void check_heads(const StableTensor& query, const StableTensor& key, const StableTensor& centroids) {
  check(query.dim() == 4 && key.dim() == 4, "query, key: expected 4 dimensions, (batch, heads, length, head_dim), got ",
        shape_of(query), " and ", shape_of(key));
  check_dtype("key", key, query.scalar_type(), " like query");
  check_device("key", key, query);
  check(key.size(1) >= 1 && query.size(1) % key.size(1) == 0, "query: expected heads to be a multiple of the ",
        key.size(1), " heads of key, got ", query.size(1));
  check_shape("key", key, {query.size(0), key.size(1), key.size(2), query.size(3)});
  check(centroids.dim() == 3 && centroids.size(0) == query.size(1) && centroids.size(2) == query.size(3),
        "centroids: expected shape (", query.size(1), ", clusters, ", query.size(3), "), got ", shape_of(centroids));
}

StableTensor nearest(const RouteParams& route, const StableTensor& like) {
  NearestParams p{route};
  StableTensor result = torch::stable::new_empty(like, std::vector{p.batch, p.heads, p.length}, ScalarType::Int);
  p.nearest = static_cast<std::int32_t*>(result.data_ptr());
  run(p);
  return result;
}

// indices (batch, heads, slots) and offsets (batch, heads, clusters + 1); what of a head's slots is not in use holds 0.
using Lists = std::tuple<StableTensor, StableTensor>;

Lists empty_lists(const StableTensor& like, const RouteParams& p, std::int64_t slots) {
  return {torch::stable::new_empty(like, std::vector{p.batch, p.heads, slots}, ScalarType::Int),
          torch::stable::new_empty(like, std::vector{p.batch, p.heads, p.clusters + 1}, ScalarType::Int)};
}

Lists balanced(const RouteParams& route, const StableTensor& like, std::int64_t cluster_size) {
  SelectParams p{route};
  p.cluster_size = std::min(cluster_size, p.length);
  const std::int64_t slots = p.clusters * p.cluster_size, heads = p.batch * p.heads;
  check(slots <= std::numeric_limits<std::int32_t>::max(), "cluster_size: expected at most ",
        std::numeric_limits<std::int32_t>::max() / p.clusters, " for ", p.clusters, " clusters, got ", cluster_size);
  Lists result = empty_lists(like, p, slots);
  StableTensor counts = torch::stable::new_empty(like, std::vector{p.batch, p.heads, p.clusters}, ScalarType::Int);
  p.indices = static_cast<std::int32_t*>(std::get<0>(result).data_ptr());
  p.counts = static_cast<std::int32_t*>(counts.data_ptr());
  run(p);
  CompactClustersParams compact;
  compact.heads = heads;
  compact.clusters = p.clusters;
  compact.cluster_size = p.cluster_size;
  compact.counts = p.counts;
  compact.indices = p.indices;
  compact.offsets = static_cast<std::int32_t*>(std::get<1>(result).data_ptr());
  run(compact);
  return result;
}

Lists ragged(const RouteParams& p, const StableTensor& like) {
  const StableTensor found = nearest(p, like);
  Lists result = empty_lists(like, p, p.length);
  SortByClusterParams sort;
  sort.heads = p.batch * p.heads;
  sort.length = p.length;
  sort.clusters = p.clusters;
  sort.nearest = static_cast<const std::int32_t*>(found.data_ptr());
  sort.indices = static_cast<std::int32_t*>(std::get<0>(result).data_ptr());
  sort.offsets = static_cast<std::int32_t*>(std::get<1>(result).data_ptr());
  run(sort);
  return result;
}

using Routes = std::tuple<StableTensor, StableTensor, StableTensor, StableTensor>;

Routes route(const StableTensor& query, const StableTensor& key, const StableTensor& centroids,
             std::int64_t cluster_size_q, std::int64_t cluster_size_k, const std::string& routing, bool shared_qk) {
  check(routing == "topk" || routing == "argmax", "routing: expected topk or argmax, got ", routing);
  check_heads(query, key, centroids);
  check(!shared_qk || query.size(2) == key.size(2),
        "shared_qk: expected False where query and key differ in length, got True with ", query.size(2), " and ",
        key.size(2));
  for (const std::int64_t size : {cluster_size_q, cluster_size_k})
    check(size >= 1 || routing == "argmax", "cluster_size: expected 1 or more, got ", size);
  const auto lists_of = [&](const char* name, const StableTensor& rows, std::int64_t size) {
    RouteParams p;
    read(name, rows, centroids, p);
    return routing == "topk" ? balanced(p, rows, size) : ragged(p, rows);
  };
  const auto [query_indices, query_offsets] = lists_of("query", query, cluster_size_q);
  if (shared_qk) {
    const StableTensor none = torch::stable::new_empty(query, std::vector<std::int64_t>{0}, ScalarType::Int);
    return {query_indices, query_offsets, none,
            torch::stable::new_empty(query, std::vector<std::int64_t>{0}, ScalarType::Int)};
  }
  const auto [key_indices, key_offsets] = lists_of("key", key, cluster_size_k);
  return {query_indices, query_offsets, key_indices, key_offsets};
}

StableTensor nearest_centroids(const StableTensor& rows, const StableTensor& centroids) {
  RouteParams p;
  read("rows", rows, centroids, p);
  return nearest(p, rows);
}

using Statistics = std::tuple<StableTensor, StableTensor>;

// Of queries and keys half each.
Statistics centroid_sums(const StableTensor& query, const StableTensor& key, const StableTensor& centroids) {
  check_heads(query, key, centroids);
  const std::vector shape{centroids.size(0), centroids.size(1)};
  const StableTensor sums = torch::stable::new_zeros(centroids, centroids.sizes(), ScalarType::Double);
  const StableTensor counts = torch::stable::new_zeros(centroids, shape, ScalarType::Double);
  for (const auto& [name, rows] : {std::pair("query", &query), std::pair("key", &key)}) {
    CentroidSumsParams p;
    read(name, *rows, centroids, p);
    const StableTensor found = nearest(p, *rows);
    p.nearest = static_cast<const std::int32_t*>(found.data_ptr());
    p.sums = static_cast<double*>(sums.data_ptr());
    p.counts = static_cast<double*>(counts.data_ptr());
    run(p);
  }
  const auto half = [&](const StableTensor& x) {
    StableTensor result = torch::stable::new_empty(x, x.sizes(), ScalarType::Float);
    run(HalveSumsParams{x.numel(), static_cast<const double*>(x.data_ptr()), static_cast<float*>(result.data_ptr())});
    return result;
  };
  return {half(sums), half(counts)};
}

void update_centroids_(const StableTensor& centroids, const StableTensor& counts, const StableTensor& sums,
                       const StableTensor& members, double decay) {
  check(decay >= 0 && decay <= 1, "decay: expected from 0 to 1, got ", decay);
  check_dtype("centroids", centroids, ScalarType::Float, "");
  check(centroids.dim() == 3, "centroids: expected shape (heads, clusters, head_dim), got ", shape_of(centroids));
  const std::int64_t heads = centroids.size(0), clusters = centroids.size(1), dim = centroids.size(2);
  for (const auto& [name, x] : {std::pair("counts", &counts), std::pair("members", &members)}) {
    check_dtype(name, *x, ScalarType::Float, "");
    check_shape(name, *x, {heads, clusters});
    check_device(name, *x, centroids);
  }
  check_dtype("sums", sums, ScalarType::Float, "");
  check_shape("sums", sums, {heads, clusters, dim});
  for (const auto& [name, x] : {std::pair("centroids", &centroids), std::pair("counts", &counts),
                                std::pair("sums", &sums), std::pair("members", &members)})
    check(x->is_contiguous(), name, ": expected a contiguous tensor, got one with other strides");
  UpdateCentroidsParams p;
  p.heads = heads;
  p.clusters = clusters;
  p.head_dim = dim;
  p.decay = decay;
  p.sums = static_cast<const float*>(sums.data_ptr());
  p.members = static_cast<const float*>(members.data_ptr());
  p.centroids = static_cast<float*>(centroids.data_ptr());
  p.counts = static_cast<float*>(counts.data_ptr());
  run(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(attnx, m) {
  m.def(
      "route(Tensor query, Tensor key, Tensor centroids, SymInt cluster_size_q, SymInt cluster_size_k, str routing, "
      "bool shared_qk) -> (Tensor query_indices, Tensor query_offsets, Tensor key_indices, Tensor key_offsets)");
  m.def("nearest_centroids(Tensor rows, Tensor centroids) -> Tensor");
  m.def("centroid_sums(Tensor query, Tensor key, Tensor centroids) -> (Tensor sums, Tensor members)");
  m.def("update_centroids_(Tensor(a!) centroids, Tensor(b!) counts, Tensor sums, Tensor members, float decay) -> ()");
}

// CUDA has no kernels yet, nor has the emulator: there the table's refusal answers.
STABLE_TORCH_LIBRARY_IMPL(attnx, CPU, m) {
  m.impl("update_centroids_", TORCH_BOX(&update_centroids_));
  if (kCudaOnHost) return;
  m.impl("route", TORCH_BOX(&route));
  m.impl("nearest_centroids", TORCH_BOX(&nearest_centroids));
  m.impl("centroid_sums", TORCH_BOX(&centroid_sums));
}

}  // namespace attnx::ops
