#include "route_rows.h"

#include <limits>

#include "attnx/capability.h"

namespace attnx::ops {

RouteParams read_rows(std::string_view name, const StableTensor& rows, const StableTensor& centroids, bool packed) {
  const Capability& row = Target{kRouting, rows}.capability();
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

void check_heads(const RoutedRows& x, bool packed) {
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

StableTensor empty_ints(const StableTensor& like, const std::vector<std::int64_t>& shape) {
  return make_empty(like, shape, ScalarType::Int);
}

StableTensor find_nearest(const RouteParams& route, const StableTensor& rows, bool by_sequence) {
  NearestParams p{route, by_sequence};
  const StableTensor result = empty_ints(rows, {p.batch, p.heads, p.length});
  p.nearest = data<std::int32_t>(result);
  run(p, {kRouting, rows});
  return result;
}

}  // namespace attnx::ops
