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

// The rows of sequence b may be [leftpad[b], seqused[b]) alone; those of no sequence are in no cluster.
struct RowLengths {
  std::optional<StableTensor> seqused_q, leftpad_q, seqused_k, leftpad_k;
  ATTNX_FIELDS(seqused_q, leftpad_q, seqused_k, leftpad_k)
};
struct LengthsOfRows {
  std::optional<StableTensor> seqused, leftpad;
  ATTNX_FIELDS(seqused, leftpad)
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
// Packed sequences are one entry of a batch, whose clusters are those of the sequences, one after another.
struct Routes {
  StableTensor query_indices, query_offsets, key_indices, key_offsets;
  ATTNX_FIELDS(query_indices, query_offsets, key_indices, key_offsets)
};

// It reads rows and the centroids that they are compared with, which belong to the heads of queries.
RouteParams read_rows(std::string_view name, const StableTensor& rows, const StableTensor& centroids,
                      bool packed = false) {
  const Capability& row = Target{kSystem, rows}.capability();
  const std::int64_t rank = packed ? 3 : 4;
  check(rows.dim() == rank, name, ": expected ", rank, " dimensions, ",
        packed ? "(rows, heads, head_dim)" : "(batch, heads, length, head_dim)", ", got shape ", shape_of(rows));
  const std::int64_t length = rows.size(packed ? 0 : 2), head_dim = rows.size(rank - 1);
  check(lists(row.dtypes, dtype_of(rows)), name, ": expected one of ", row.dtypes, ", got ", dtype_of(rows));
  check_layout(name, rows);
  check(rows.size(1) >= 1 && head_dim >= row.head_dim_min && head_dim <= row.head_dim_max, name,
        ": expected a head or more and head_dim from ", row.head_dim_min, " to ", row.head_dim_max, ", got shape ",
        shape_of(rows));
  check(length <= std::numeric_limits<std::int32_t>::max(), name, ": expected at most 2147483647 rows, got ", length);
  check_dtype("centroids", centroids, ScalarType::Float, "");
  check(centroids.dim() == 3 && centroids.size(0) >= 1 && centroids.size(0) % rows.size(1) == 0 &&
            centroids.size(1) >= 1 && centroids.size(2) == head_dim,
        "centroids: expected shape (heads of query, clusters, ", head_dim, ") for ", name, " of shape ", shape_of(rows),
        ", got ", shape_of(centroids));
  check_contiguous("centroids", centroids);
  RouteParams p;
  p.dtype = to_dtype(rows.scalar_type());
  p.batch = packed ? 1 : rows.size(0);
  p.heads = centroids.size(0);
  p.length = length;
  p.head_dim = head_dim;
  p.group = p.heads / rows.size(1);
  p.rows = view_rows(rows);
  p.clusters = centroids.size(1);
  p.centroids = data<const float>(centroids);
  return p;
}

void check_heads(const Rows& x, bool packed = false) {
  const auto& [query, key, centroids] = x;
  const std::int64_t rank = packed ? 3 : 4;
  check(query.dim() == rank && key.dim() == rank, "query, key: expected ", rank, " dimensions, ",
        packed ? "(rows, heads, head_dim)" : "(batch, heads, length, head_dim)", ", got ", shape_of(query), " and ",
        shape_of(key));
  check_dtype("key", key, query.scalar_type(), " like query");
  check(key.size(1) >= 1 && query.size(1) % key.size(1) == 0, "query: expected heads to be a multiple of the ",
        key.size(1), " heads of key, got ", query.size(1));
  const std::int64_t head_dim = query.size(rank - 1);
  if (packed) {
    check_shape("key", key, {key.size(0), key.size(1), head_dim});
  } else {
    check_shape("key", key, {query.size(0), key.size(1), key.size(2), head_dim});
  }
  check(centroids.dim() == 3 && centroids.size(0) == query.size(1) && centroids.size(2) == head_dim,
        "centroids: expected shape (", query.size(1), ", clusters, ", head_dim, "), got ", shape_of(centroids));
}

SequenceRows read_lengths(std::string_view seqused_name, const std::optional<StableTensor>& seqused,
                          std::string_view leftpad_name, const std::optional<StableTensor>& leftpad,
                          const RouteParams& p) {
  check(seqused.has_value() == leftpad.has_value(), seqused_name, ", ", leftpad_name,
        ": expected both or neither, got one of them");
  if (!seqused) return {};
  const auto read = [&](std::string_view name, const StableTensor& x) {
    check_dtype(name, x, ScalarType::Int, "");
    check_shape(name, x, {p.batch});
    check_contiguous(name, x);
    return data<const std::int32_t>(x);
  };
  const SequenceRows rows{1, read(leftpad_name, *leftpad), read(seqused_name, *seqused)};
  const auto starts = values_on_host(*leftpad), ends = values_on_host(*seqused);
  for (std::int64_t b = 0; starts && ends && b < p.batch; ++b) {
    const std::int32_t start = data<const std::int32_t>(*starts)[b], end = data<const std::int32_t>(*ends)[b];
    check(end >= 0 && end <= p.length, seqused_name, ": expected lengths from 0 to ", p.length, ", got ", end, " at ",
          b);
    check(start >= 0 && start <= end, leftpad_name, ": expected starts from 0 to ", seqused_name, ", ", end, ", got ",
          start, " at ", b);
  }
  return rows;
}
SequenceRows read_lengths(std::string_view name, const RowLengths& lengths, const RouteParams& p) {
  const auto& [seqused_q, leftpad_q, seqused_k, leftpad_k] = lengths;
  return name == "query" ? read_lengths("seqused_q", seqused_q, "leftpad_q", leftpad_q, p)
                         : read_lengths("seqused_k", seqused_k, "leftpad_k", leftpad_k, p);
}

// Their values are looked at in host memory alone.
void check_same_offsets(const PackedWithPadding& packed) {
  const auto of_q = values_on_host(packed.cu_seqlens_q), of_k = values_on_host(packed.cu_seqlens_k);
  if (!of_q || !of_k) return;
  const auto *q = data<const std::int32_t>(*of_q), *k = data<const std::int32_t>(*of_k);
  for (std::int64_t i = 0; i < of_q->size(0); ++i)
    check(q[i] == k[i], "shared_qk: expected False where cu_seqlens_q and cu_seqlens_k differ, got True with ", q[i],
          " and ", k[i], " at ", i);
}

StableTensor empty_ints(const StableTensor& like, const std::vector<std::int64_t>& shape) {
  return make_empty(like, shape, ScalarType::Int);
}

StableTensor find_nearest(const RouteParams& route, const StableTensor& rows, bool by_sequence = false) {
  NearestParams p{route, by_sequence};
  const StableTensor result = empty_ints(rows, {p.batch, p.heads, p.length});
  p.nearest = data<std::int32_t>(result);
  run(p, {kSystem, rows});
  return result;
}

using Lists = std::pair<StableTensor, StableTensor>;

// No list is longer than `longest`, and how many slots there are follows from numbers of the call alone.
Lists balanced(const RouteParams& route, const StableTensor& rows, std::int64_t cluster_size, std::int64_t longest) {
  SelectParams p{route};
  p.cluster_size = std::min({cluster_size, longest, p.length});
  const std::int64_t clusters = p.sequences.count * p.clusters, most = p.sequences.count * p.cluster_size;
  const std::int64_t slots = p.clusters * std::min(most, p.length);
  check(slots <= std::numeric_limits<std::int32_t>::max(), "cluster_size: expected at most ",
        std::numeric_limits<std::int32_t>::max() / p.clusters, " for ", p.clusters, " clusters, got ", cluster_size);
  const StableTensor lists = empty_ints(rows, {p.batch, p.heads, clusters, p.cluster_size});
  const StableTensor counts = empty_ints(rows, {p.batch, p.heads, clusters});
  const StableTensor indices = empty_ints(rows, {p.batch, p.heads, slots});
  const StableTensor offsets = empty_ints(rows, {p.batch, p.heads, clusters + 1});
  p.indices = data<std::int32_t>(lists);
  p.counts = data<std::int32_t>(counts);
  run(p, {kSystem, rows});
  run(CompactClustersParams{.heads = p.batch * p.heads,
                            .clusters = clusters,
                            .cluster_size = p.cluster_size,
                            .slots = slots,
                            .lists = p.indices,
                            .counts = p.counts,
                            .indices = data<std::int32_t>(indices),
                            .offsets = data<std::int32_t>(offsets)},
      {kSystem, rows});
  return {indices, offsets};
}

Lists ragged(const RouteParams& p, const StableTensor& rows) {
  const std::int64_t clusters = p.sequences.count * p.clusters;
  check(clusters <= std::numeric_limits<std::int32_t>::max(), "centroids: expected at most ",
        std::numeric_limits<std::int32_t>::max(), " clusters of all sequences, got ", clusters);
  const StableTensor nearest = find_nearest(p, rows, /*by_sequence=*/true);
  const StableTensor indices = empty_ints(rows, {p.batch, p.heads, p.length});
  const StableTensor offsets = empty_ints(rows, {p.batch, p.heads, clusters + 1});
  run(SortByClusterParams{.heads = p.batch * p.heads,
                          .length = p.length,
                          .clusters = clusters,
                          .nearest = data<std::int32_t>(nearest),
                          .indices = data<std::int32_t>(indices),
                          .offsets = data<std::int32_t>(offsets)},
      {kSystem, rows});
  return {indices, offsets};
}

void check_options(const ClusterSizes& sizes, const RouteOptions& options) {
  check(options.routing == "topk" || options.routing == "argmax", "routing: expected topk or argmax, got ",
        options.routing);
  for (const std::int64_t size : {sizes.cluster_size_q.value, sizes.cluster_size_k.value})
    check(size >= 1 || options.routing == "argmax", "cluster_size: expected 1 or more, got ", size);
}

// lists_of(name, rows, cluster_size) makes them.
template <class ListsOf>
Routes routes_of(const Rows& x, const ClusterSizes& sizes, bool shared_qk, const ListsOf& lists_of) {
  const auto [query_indices, query_offsets] = lists_of("query", x.query, sizes.cluster_size_q);
  if (shared_qk) return {query_indices, query_offsets, empty_ints(x.query, {0}), empty_ints(x.query, {0})};
  const auto [key_indices, key_offsets] = lists_of("key", x.key, sizes.cluster_size_k);
  return {query_indices, query_offsets, key_indices, key_offsets};
}

// Where keys are in the clusters of the queries at their place, only the lengths of queries matter.
Routes route(const Rows& x, const RowLengths& lengths, const ClusterSizes& sizes, const RouteOptions& options) {
  const bool shared_qk = options.shared_qk;
  check_options(sizes, options);
  check_heads(x);
  check(!shared_qk || x.query.size(2) == x.key.size(2),
        "shared_qk: expected False where query and key differ in length, got True with ", x.query.size(2), " and ",
        x.key.size(2));
  return routes_of(x, sizes, shared_qk, [&](std::string_view name, const StableTensor& rows, std::int64_t size) {
    RouteParams p = read_rows(name, rows, x.centroids);
    p.sequences = read_lengths(name, lengths, p);
    return options.routing == "topk" ? balanced(p, rows, size, p.length) : ragged(p, rows);
  });
}

Routes route_varlen(const Rows& x, const PackedWithPadding& packed, const ClusterSizes& sizes,
                    const RouteOptions& options) {
  const bool shared_qk = options.shared_qk;
  check_options(sizes, options);
  check_heads(x, /*packed=*/true);
  const Target target{kSystem, x.query};
  read_packing(target, packed, x.query.size(0), x.key.size(0));
  check(packed.cu_seqlens_q.size(0) >= 2, "cu_seqlens_q: expected one sequence or more, got shape ",
        shape_of(packed.cu_seqlens_q));
  check(!shared_qk || x.query.size(0) == x.key.size(0),
        "shared_qk: expected False where query and key differ in length, got True with ", x.query.size(0), " and ",
        x.key.size(0), " rows");
  if (shared_qk) check_same_offsets(packed);
  return routes_of(x, sizes, shared_qk, [&](std::string_view name, const StableTensor& rows, std::int64_t size) {
    const bool of_queries = name == "query";
    const StableTensor& offsets = of_queries ? packed.cu_seqlens_q : packed.cu_seqlens_k;
    const auto* starts = data<const std::int32_t>(offsets);
    RouteParams p = read_rows(name, rows, x.centroids, /*packed=*/true);
    p.sequences = {offsets.size(0) - 1, starts, starts + 1};
    const std::int64_t longest = of_queries ? packed.max_seqlen_q : packed.max_seqlen_k;
    return options.routing == "topk" ? balanced(p, rows, size, longest) : ragged(p, rows);
  });
}

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
Statistics centroid_sums(const Rows& x, const RowLengths& lengths) {
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
                                {define<route>("route"), define<route_varlen>("route_varlen"),
                                 define<nearest_centroids>("nearest_centroids"),
                                 define<centroid_sums>("centroid_sums")});
const Registration update_registration(kSystem, OnHost::kServed, {define<update_centroids>("update_centroids_")});

}  // namespace

}  // namespace attnx::ops
