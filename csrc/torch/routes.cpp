// This file registers torch.ops.attnx.route and its packed form, which tell which rows of each head form clusters
// around its centroids. The method is that of Roy et al., arXiv 2003.05997.
#include <algorithm>
#include <limits>

#include "route_rows.h"

namespace attnx::ops {

namespace {

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

// Their values are looked at in host memory alone.
void check_same_offsets(const PackedWithPadding& packed) {
  const auto of_q = values_on_host(packed.cu_seqlens_q), of_k = values_on_host(packed.cu_seqlens_k);
  if (!of_q || !of_k) return;
  const auto *q = data<const std::int32_t>(*of_q), *k = data<const std::int32_t>(*of_k);
  for (std::int64_t i = 0; i < of_q->size(0); ++i)
    check(q[i] == k[i], "shared_qk: expected False where cu_seqlens_q and cu_seqlens_k differ, got True with ", q[i],
          " and ", k[i], " at ", i);
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
  run(p, {kRouting, rows});
  run(CompactClustersParams{.heads = p.batch * p.heads,
                            .clusters = clusters,
                            .cluster_size = p.cluster_size,
                            .slots = slots,
                            .lists = p.indices,
                            .counts = p.counts,
                            .indices = data<std::int32_t>(indices),
                            .offsets = data<std::int32_t>(offsets)},
      {kRouting, rows});
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
      {kRouting, rows});
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
Routes routes_of(const RoutedRows& x, const ClusterSizes& sizes, bool shared_qk, const ListsOf& lists_of) {
  const auto [query_indices, query_offsets] = lists_of("query", x.query, sizes.cluster_size_q);
  if (shared_qk) return {query_indices, query_offsets, empty_ints(x.query, {0}), empty_ints(x.query, {0})};
  const auto [key_indices, key_offsets] = lists_of("key", x.key, sizes.cluster_size_k);
  return {query_indices, query_offsets, key_indices, key_offsets};
}

// Where keys are in the clusters of the queries at their place, only the lengths of queries matter.
Routes route(const RoutedRows& x, const RowLengths& lengths, const ClusterSizes& sizes, const RouteOptions& options) {
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

Routes route_varlen(const RoutedRows& x, const PackedWithPadding& packed, const ClusterSizes& sizes,
                    const RouteOptions& options) {
  const bool shared_qk = options.shared_qk;
  check_options(sizes, options);
  check_heads(x, /*packed=*/true);
  const Target target{kRouting, x.query};
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

const Registration registration(kRouting, OnHost::kRefused,
                                {define<route>("route"), define<route_varlen>("route_varlen")});

}  // namespace

}  // namespace attnx::ops
