#include "terms.h"

#include <algorithm>
#include <cmath>

#include "attnx/capability.h"

namespace attnx::ops {

namespace {

void check_feature(const Target& target, std::string_view feature, std::string_view name) {
  const Capability& row = target.capability();
  check(lists(row.features, feature), name, ": expected none, as ", row.op, " has no ", feature, " on ", row.backend,
        ", got one");
}

std::int64_t stride_of(const StableTensor& x, std::int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

// Packed keys have no batch stride.
PerKey view_per_key(const StableTensor& x) {
  if (x.dim() == 2) return {x.data_ptr(), 0, stride_of(x, 0)};
  return {x.data_ptr(), stride_of(x, 0), stride_of(x, 1)};
}

PerKey read_per_key(const Target& target, std::string_view name, const StableTensor& x, const AttentionParams& p) {
  check_feature(target, name, name);
  check_dtype(name, x, sum_type(target.tensor), " (the type of the sums)");
  const auto is_one_of = [&](std::int64_t dim, std::int64_t size) { return x.size(dim) == 1 || x.size(dim) == size; };
  if (p.cu_seqlens_q) {
    check(x.dim() == 2 && is_one_of(0, p.heads_q) && x.size(1) == p.packed_rows_k, name, ": expected shape (",
          p.heads_q, " or 1, ", p.packed_rows_k, "), query heads and keys, got ", shape_of(x));
  } else {
    check(x.dim() == 3 && is_one_of(0, p.batch) && is_one_of(1, p.heads_q) && x.size(2) == p.length_k, name,
          ": expected shape (", p.batch, " or 1, ", p.heads_q, " or 1, ", p.length_k,
          "), sequences, query heads and keys, got ", shape_of(x));
  }
  check_layout(name, x);
  return view_per_key(x);
}

template <class T>
void check_shares(const StableTensor& x) {
  const PerKey view = view_per_key(x);
  const std::int64_t rank = x.dim(), batch = rank == 3 ? x.size(0) : 1, heads = x.size(rank - 2);
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t j = 0; j < x.size(rank - 1); ++j) {
        const T share = static_cast<const T*>(view.data)[b * view.batch_stride + h * view.head_stride + j];
        check(share >= 0 && share <= 1, "key_mask: expected numbers from 0 to 1, got ", share, " at key ", j);
      }
}

void check_key_mask(const StableTensor& x) {
  const auto values = values_on_host(x);
  if (!values) return;
  x.scalar_type() == ScalarType::Double ? check_shares<double>(*values) : check_shares<float>(*values);
}

// c tanh(x / c) is computed in the type of sums, where x / c must not fall below the normal numbers.
double read_softcap(const Target& target, double softcap, const AttentionParams& p) {
  check(softcap > 0, "softcap: expected None or a number above 0, got ", softcap);
  check_feature(target, "softcap", "softcap");
  if (std::isinf(softcap)) return 0;
  constexpr double kLargest = 1e30;
  check(p.dtype == DType::kFloat64 || (softcap >= 1 / kLargest && softcap <= kLargest),
        "softcap: expected a number from 1e-30 to 1e30, or inf for none, got ", softcap);
  return softcap;
}

void read_dropout(const Target& target, const Terms& x, LogitTerms& terms) {
  check(x.dropout_p >= 0 && x.dropout_p < 1, "dropout_p: expected a probability from 0 to below 1, got ", x.dropout_p);
  if (x.dropout_p == 0) return;
  check_feature(target, "dropout", "dropout_p");
  check(x.seed && x.offset, x.seed ? "offset" : "seed", ": expected a tensor with dropout_p above 0, got None");
  check_round(*x.seed, *x.offset);
  terms.dropout = x.dropout_p;
  terms.seed = data<const std::int64_t>(*x.seed);
  terms.offset = data<const std::int64_t>(*x.offset);
}

MaskKind kind_of(const StableTensor& mask, const StableTensor& query) {
  if (mask.scalar_type() == ScalarType::Bool) return MaskKind::kBool;
  if (mask.scalar_type() == sum_type(query)) return MaskKind::kSum;
  check(mask.scalar_type() == query.scalar_type(), "attn_mask: expected bool, ", dtype_of(query), " like query, or ",
        to_string(sum_type(query)), ", got ", dtype_of(mask));
  return MaskKind::kInput;
}

PairMask view_pairs(MaskKind kind, const StableTensor& x) {
  return {kind, x.data_ptr(), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2), stride_of(x, 3)};
}

void read_mask(const Target& target, const StableTensor& mask, AttentionParams& p) {
  check_feature(target, "attn_mask", "attn_mask");
  const MaskKind kind = kind_of(mask, target.tensor);
  const auto fits = [&](std::int64_t dim, std::int64_t size) { return mask.size(dim) == 1 || mask.size(dim) == size; };
  check(mask.dim() == 4 && fits(0, p.batch) && fits(1, p.heads_q) && fits(2, p.length_q) && mask.size(3) == p.length_k,
        "attn_mask: expected shape (", p.batch, " or 1, ", p.heads_q, " or 1, ", p.length_q, " or 1, ", p.length_k,
        "), sequences, query heads, queries and keys, got ", shape_of(mask));
  p.terms.attn_mask = view_pairs(kind, mask);
}

// Numbers by distance are read as a mask whose rows overlap.
PairMask view_distances(const StableTensor& x, const AttentionParams& p) {
  const std::int64_t bytes = x.scalar_type() == ScalarType::Double ? 8 : 4;
  char* const first = static_cast<char*>(x.data_ptr()) + bytes * (p.length_k - 1);
  return {MaskKind::kSum, first, stride_of(x, 0), stride_of(x, 1), 1, -1};
}

void read_distance_bias(const Target& target, const StableTensor& x, AttentionParams& p) {
  check_feature(target, "distance_bias", "distance_bias");
  check(p.terms.attn_mask.kind == MaskKind::kNone, "distance_bias: expected none beside attn_mask, got one");
  check_dtype("distance_bias", x, sum_type(target.tensor), " (the type of the sums)");
  const std::int64_t distances = std::max<std::int64_t>(p.length_q + p.length_k - 1, 0);
  const auto fits = [&](std::int64_t dim, std::int64_t size) { return x.size(dim) == 1 || x.size(dim) == size; };
  check(x.dim() == 3 && fits(0, p.batch) && fits(1, p.heads_q) && x.size(2) == distances,
        "distance_bias: expected shape (", p.batch, " or 1, ", p.heads_q, " or 1, ", distances,
        "), sequences, query heads and distances, got ", shape_of(x));
  check_layout("distance_bias", x);
  if (p.length_q > 0 && p.length_k > 0) p.terms.attn_mask = view_distances(x, p);
}

// Bounds may hold any numbers, so that nothing has to look at them.
RowBounds read_row_bounds(const Target& target, const StableTensor& x, const AttentionParams& p) {
  check_feature(target, "row_bounds", "row_bounds");
  check_dtype("row_bounds", x, ScalarType::Int, "");
  const auto fits = [&](std::int64_t dim, std::int64_t size) { return x.size(dim) == 1 || x.size(dim) == size; };
  check(x.dim() == 4 && fits(0, p.batch) && fits(1, p.heads_q) && fits(2, p.length_q) && x.size(3) == 2,
        "row_bounds: expected shape (", p.batch, " or 1, ", p.heads_q, " or 1, ", p.length_q,
        " or 1, 2), sequences, query heads, queries, and a start and an end, got ", shape_of(x));
  check_layout("row_bounds", x);
  return {data<const std::int32_t>(x), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2)};
}

StableTensor empty_per_key(const Target& target, std::string_view name, bool wanted,
                           const std::optional<StableTensor>& x, PerKey& place) {
  if (!wanted || !x) return make_empty(target.tensor, std::vector<std::int64_t>{0}, sum_type(target.tensor));
  check_feature(target, std::string(name) + "_gradient", name);
  const auto sizes = x->sizes();
  StableTensor gradient =
      make_empty(target.tensor, std::vector<std::int64_t>(sizes.begin(), sizes.end()), sum_type(target.tensor));
  place = view_per_key(gradient);
  return gradient;
}

// What kernels read of these terms, and write of their gradients, is about all keys of a sequence.
void check_no_lengths(bool given, std::string_view name, const AttentionParams& p) {
  check(!given || !p.key_ends || p.cu_seqlens_q, name, ": expected none beside seqused_k and leftpad_k, got one");
}

}  // namespace

void read_terms(const Target& target, const Terms& x, AttentionParams& p) {
  check_no_lengths(x.key_bias.has_value(), "key_bias", p);
  check_no_lengths(x.key_mask.has_value(), "key_mask", p);
  check_no_lengths(x.dropout_p > 0, "dropout_p", p);
  if (x.softcap) p.terms.softcap = read_softcap(target, *x.softcap, p);
  if (x.key_bias) p.terms.key_bias = read_per_key(target, "key_bias", *x.key_bias, p);
  if (x.key_mask) {
    p.terms.key_mask = read_per_key(target, "key_mask", *x.key_mask, p);
    check_key_mask(*x.key_mask);
  }
  read_dropout(target, x, p.terms);
}

void read_terms(const Target& target, const PairTerms& x, AttentionParams& p) {
  if (x.row_bounds) p.row_bounds = read_row_bounds(target, *x.row_bounds, p);
  check_no_lengths(x.attn_mask.has_value(), "attn_mask", p);
  check_no_lengths(x.distance_bias.has_value(), "distance_bias", p);
  if (x.attn_mask) read_mask(target, *x.attn_mask, p);
  if (x.distance_bias) read_distance_bias(target, *x.distance_bias, p);
}

TermGradients empty_gradients(const Target& target, const WantedTerms& wanted, const Terms& x, BackwardParams& p) {
  return {empty_per_key(target, "key_bias", wanted.key_bias_gradient, x.key_bias, p.grad_key_bias),
          empty_per_key(target, "key_mask", wanted.key_mask_gradient, x.key_mask, p.grad_key_mask)};
}

PairTermGradients empty_gradients(const Target& target, const WantedPairTerms& wanted, const PairTerms& x,
                                  BackwardParams& p) {
  const auto none = [&] { return make_empty(target.tensor, std::vector<std::int64_t>{0}, sum_type(target.tensor)); };
  PairTermGradients gradients{none(), none()};
  const auto zeros_like = [&](const StableTensor& argument) {
    const auto sizes = argument.sizes();
    return make_zeros(target.tensor, std::vector<std::int64_t>(sizes.begin(), sizes.end()), sum_type(target.tensor));
  };
  if (wanted.attn_mask_gradient && x.attn_mask) {
    check(x.attn_mask->scalar_type() != ScalarType::Bool,
          "attn_mask_gradient: expected False for a mask of bool, got True");
    check_feature(target, "attn_mask_gradient", "attn_mask");
    gradients.grad_attn_mask = zeros_like(*x.attn_mask);
    p.grad_attn_mask = view_pairs(MaskKind::kSum, gradients.grad_attn_mask);
  }
  if (wanted.distance_bias_gradient && x.distance_bias) {
    check_feature(target, "distance_bias_gradient", "distance_bias");
    gradients.grad_distance_bias = zeros_like(*x.distance_bias);
    if (p.length_q > 0 && p.length_k > 0) p.grad_attn_mask = view_distances(gradients.grad_distance_bias, p);
  }
  return gradients;
}

}  // namespace attnx::ops
