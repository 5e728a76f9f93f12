#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "attnx/capability.h"
#include "backend.h"

namespace attnx::ops {

namespace {

const Capability& capability(const AttentionParams& p, const Arguments& args) {
  const char* of_score = p.score == Score::kSigmoid ? "sigmoid_attention" : "softmax_attention";
  return *find_capability(args.op ? args.op : of_score, uses_cuda(args.query) ? "cuda" : "cpu");
}

DType read_dtype(const StableTensor& query, const Capability& row) {
  check(lists(row.dtypes, dtype_of(query)), "query: expected one of ", row.dtypes, " (", row.op, " on ", row.backend,
        "), got ", dtype_of(query));
  switch (query.scalar_type()) {
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: return DType::kFloat32;
  }
}

PerHead read_per_head(const char* name, const std::optional<StableTensor>& x, const StableTensor& query,
                      std::int64_t heads) {
  if (!x) return {};
  check_dtype(name, *x, sum_type(query), " (the type of the sums)");
  check(x->dim() == 0 || (x->dim() == 1 && x->size(0) == heads), name, ": expected shape () or (", heads,
        ",), one number per query head, got ", shape_of(*x));
  check_device(name, *x, query);
  return {x->data_ptr(), x->dim() == 0 ? 0 : x->stride(0)};
}

// The longest sequence, after checking that the offsets, in host memory, rise from 0 to rows.
std::int64_t read_lengths(const char* name, const StableTensor& x, std::int64_t rows) {
  const auto* offsets = static_cast<const std::int32_t*>(x.data_ptr());
  const std::int64_t last = x.size(0) - 1;
  check(offsets[0] == 0, name, ": expected to start at 0, got ", offsets[0]);
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < last; ++b) {
    const std::int64_t length = std::int64_t(offsets[b + 1]) - offsets[b];
    check(length >= 0, name, ": expected rising offsets, got ", offsets[b + 1], " after ", offsets[b], " at index ",
          b + 1);
    longest = std::max(longest, length);
  }
  check(offsets[last] == rows, name, ": expected to end at the number of rows, ", rows, ", got ", offsets[last]);
  return longest;
}

// What no sequence is longer than.
std::int64_t read_offsets(const char* name, const StableTensor& x, std::int64_t rows, const char* max_name,
                          std::int64_t max_seqlen, const StableTensor& query) {
  check_dtype(name, x, ScalarType::Int, "");
  check(x.dim() == 1 && x.size(0) >= 1, name, ": expected shape (batch + 1,), got ", shape_of(x));
  check_device(name, x, query);
  check(x.is_contiguous(), name, ": expected a contiguous tensor, got stride ", x.stride(0));
  const auto values = values_on_host(x);
  const std::int64_t longest = values ? read_lengths(name, *values, rows) : 0;
  check(max_seqlen >= longest, max_name, ": expected at least the longest sequence, ", longest, ", got ", max_seqlen);
  // CUDA kernels need no more than a bound, and with it lengths that were read change nothing.
  return uses_cuda(query) ? std::min(max_seqlen, rows) : longest;
}

void read_shapes(const Arguments& args, const Capability& row, AttentionParams& p) {
  const std::int64_t rank = args.packing ? 3 : 4;
  const char* layout = args.packing ? "(rows, heads, head_dim)" : "(batch, heads, length, head_dim)";
  const auto check_tensor = [&](const char* name, const StableTensor& x) {
    check(x.dim() == rank, name, ": expected ", rank, " dimensions, ", layout, ", got shape ", shape_of(x));
    check_dtype(name, x, args.query.scalar_type(), " like query");
    check_device(name, x, args.query);
    check_layout(name, x);
  };
  check_tensor("query", args.query);
  check_tensor("key", args.key);
  check_tensor("value", args.value);

  p.heads_q = args.query.size(1);
  p.heads_k = args.key.size(1);
  p.head_dim = args.query.size(rank - 1);
  p.value_dim = args.value.size(rank - 1);
  check(p.heads_k >= 1 && p.heads_q >= 1 && p.heads_q % p.heads_k == 0,
        "query: expected heads to be a multiple of the ", p.heads_k, " heads of key, got ", p.heads_q);
  const auto check_dim = [&](const char* name, std::int64_t dim) {
    check(dim >= row.head_dim_min && dim <= row.head_dim_max, name, " from ", row.head_dim_min, " to ",
          row.head_dim_max, " (", row.op, " on ", row.backend, "), got ", dim);
  };
  check_dim("query: expected head_dim", p.head_dim);
  check_dim("value: expected value_dim", p.value_dim);
  if (args.packing) {
    check_shape("key", args.key, {args.key.size(0), p.heads_k, p.head_dim});
    check_shape("value", args.value, {args.key.size(0), p.heads_k, p.value_dim});
  } else {
    p.batch = args.query.size(0);
    p.length_q = args.query.size(2);
    p.length_k = args.key.size(2);
    check_shape("key", args.key, {p.batch, p.heads_k, p.length_k, p.head_dim});
    check_shape("value", args.value, {p.batch, p.heads_k, p.length_k, p.value_dim});
  }
}

}  // namespace

void read_arguments(const Arguments& args, AttentionParams& p) {
  const Capability& row = capability(p, args);
  p.dtype = read_dtype(args.query, row);
  read_shapes(args, row, p);
  if (const Packing* packing = args.packing) {
    p.length_q = read_offsets("cu_seqlens_q", packing->cu_seqlens_q, args.query.size(0), "max_seqlen_q",
                              packing->max_seqlen_q, args.query);
    p.length_k = read_offsets("cu_seqlens_k", packing->cu_seqlens_k, args.key.size(0), "max_seqlen_k",
                              packing->max_seqlen_k, args.query);
    check_shape("cu_seqlens_k", packing->cu_seqlens_k, {packing->cu_seqlens_q.size(0)});
    p.batch = packing->cu_seqlens_q.size(0) - 1;
    p.packed_rows_q = args.query.size(0);
    p.packed_rows_k = args.key.size(0);
    p.cu_seqlens_q = static_cast<const std::int32_t*>(packing->cu_seqlens_q.data_ptr());
    p.cu_seqlens_k = static_cast<const std::int32_t*>(packing->cu_seqlens_k.data_ptr());
  }
  p.query = view_rows(args.query);
  p.key = view_rows(args.key);
  p.value = view_rows(args.value);
  p.alibi_slopes = read_per_head("alibi_slopes", args.alibi_slopes, args.query, p.heads_q);

  p.scale = args.scale ? *args.scale : 1 / std::sqrt(double(p.head_dim));
  check(std::isfinite(p.scale), "scale: expected a finite number, got ", p.scale);
  check(args.window_left >= -1 && args.window_right >= -1, "window: expected -1 (no bound) or more on each side, got (",
        args.window_left, ", ", args.window_right, ")");
  p.window_left = args.window_left;
  p.window_right = args.is_causal ? 0 : args.window_right;
}

void read_bias(const std::optional<StableTensor>& bias, const std::string& rule, double value,
               const StableTensor& query, AttentionParams& p) {
  check(rule == "none" || rule == "length" || rule == "row", "bias_rule: expected none, length or row, got ", rule);
  p.bias_rule = rule == "length" ? BiasRule::kLength : rule == "row" ? BiasRule::kRow : BiasRule::kNone;
  check(!std::isnan(value), "bias: expected a number, got nan");
  p.bias_value = value;
  p.bias = read_per_head("bias", bias, query, p.heads_q);
}

Tensor read_output(const char* name, const StableTensor& x, const Arguments& args) {
  const StableTensor& q = args.query;
  const std::int64_t dim = args.value.size(args.value.dim() - 1);
  check_dtype(name, x, q.scalar_type(), " like query");
  if (args.packing) {
    check_shape(name, x, {q.size(0), q.size(1), dim});
  } else {
    check_shape(name, x, {q.size(0), q.size(1), q.size(2), dim});
  }
  check_device(name, x, q);
  check_layout(name, x);
  return view_rows(x);
}

Tensor read_logsumexp(const char* name, const StableTensor& x, const Arguments& args) {
  const StableTensor& q = args.query;
  check_dtype(name, x, sum_type(q), "");
  if (args.packing) {
    check_shape(name, x, {q.size(1), q.size(0)});
  } else {
    check_shape(name, x, {q.size(0), q.size(1), q.size(2)});
  }
  check_device(name, x, q);
  return view_logsumexp(x);
}

StableTensor empty_rows(const StableTensor& like, std::int64_t dim) {
  if (like.dim() == 3) return torch::stable::new_empty(like, std::vector{like.size(0), like.size(1), dim});
  if (like.stride(1) < like.stride(2)) {
    const std::vector shape{like.size(0), like.size(2), like.size(1), dim};
    return torch::stable::transpose(torch::stable::new_empty(like, shape), 1, 2);
  }
  return torch::stable::new_empty(like, std::vector{like.size(0), like.size(1), like.size(2), dim});
}

StableTensor empty_logsumexp(const StableTensor& query) {
  const ScalarType dtype = sum_type(query);
  if (query.dim() == 3) return torch::stable::new_empty(query, std::vector{query.size(1), query.size(0)}, dtype);
  return torch::stable::new_empty(query, std::vector{query.size(0), query.size(1), query.size(2)}, dtype);
}

Tensor view_rows(const StableTensor& x) {
  if (x.dim() == 3) return {x.data_ptr(), 0, x.stride(1), x.stride(0)};
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Tensor view_logsumexp(const StableTensor& x) {
  if (x.dim() == 2) return {x.data_ptr(), 0, x.stride(0), x.stride(1)};
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

std::optional<StableTensor> empty_sums(const std::optional<StableTensor>& parameter, const StableTensor& query,
                                       const AttentionParams& p) {
  if (!parameter) return std::nullopt;
  return torch::stable::new_empty(query, std::vector{p.batch, p.heads_q}, ScalarType::Double);
}

double* view_sums(const std::optional<StableTensor>& sums) {
  return sums ? static_cast<double*>(sums->data_ptr()) : nullptr;
}

}  // namespace attnx::ops
