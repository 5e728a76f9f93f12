#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attnx/capability.h"
#include "attnx/policies.h"

namespace attnx::ops {

namespace {

// It returns the longest sequence, after checking that the offsets, in host memory, rise from 0 to rows, or to fewer
// where padding follows.
std::int64_t read_lengths(const char* name, const StableTensor& x, std::int64_t rows, bool has_padding) {
  const auto* offsets = data<const std::int32_t>(x);
  const std::int64_t last = x.size(0) - 1;
  check(offsets[0] == 0, name, ": expected to start at 0, got ", offsets[0]);
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < last; ++b) {
    const std::int64_t length = std::int64_t(offsets[b + 1]) - offsets[b];
    check(length >= 0, name, ": expected rising offsets, got ", offsets[b + 1], " after ", offsets[b], " at index ",
          b + 1);
    longest = std::max(longest, length);
  }
  check(offsets[last] == rows || (has_padding && offsets[last] < rows), name,
        ": expected to end at the number of rows, ", rows,
        has_padding ? ", or below, got " : " (fewer need has_padding), got ", offsets[last]);
  return longest;
}

// It returns a length that no sequence exceeds.
std::int64_t read_offsets(const char* name, const StableTensor& x, std::int64_t rows, const char* max_name,
                          std::int64_t max_seqlen, bool has_padding, const Target& target) {
  check_dtype(name, x, ScalarType::Int, "");
  check(x.dim() == 1 && x.size(0) >= 1, name, ": expected shape (batch + 1,), got ", shape_of(x));
  check(x.is_contiguous(), name, ": expected a contiguous tensor, got stride ", x.stride(0));
  const auto values = values_on_host(x);
  const std::int64_t longest = values ? read_lengths(name, *values, rows, has_padding) : 0;
  check(max_seqlen >= longest, max_name, ": expected at least the longest sequence, ", longest, ", got ", max_seqlen);
  // CUDA kernels need only a bound; with the bound a call is the same whether or not lengths were read.
  return target.on_cuda() ? std::min(max_seqlen, rows) : longest;
}

void read_packed(const Target& target, const Inputs& x, const Packed& packed, AttentionParams& p) {
  std::tie(p.length_q, p.length_k) = read_packing(
      target, {packed.cu_seqlens_q, packed.cu_seqlens_k, packed.max_seqlen_q, packed.max_seqlen_k, p.has_padding},
      x.query.size(0), x.key.size(0));
  p.batch = packed.cu_seqlens_q.size(0) - 1;
  p.packed_rows_q = x.query.size(0);
  p.packed_rows_k = x.key.size(0);
  p.cu_seqlens_q = data<const std::int32_t>(packed.cu_seqlens_q);
  p.key_starts = data<const std::int32_t>(packed.cu_seqlens_k);
  p.key_ends = p.key_starts + 1;
}

void read_shapes(const Inputs& x, const Packed* packed, const Capability& row, AttentionParams& p) {
  const std::int64_t rank = packed ? 3 : 4;
  const char* layout = packed ? "(rows, heads, head_dim)" : "(batch, heads, length, head_dim)";
  for_each_field(x, [&](std::string_view name, const StableTensor& tensor) {
    check(tensor.dim() == rank, name, ": expected ", rank, " dimensions, ", layout, ", got shape ", shape_of(tensor));
    check_dtype(name, tensor, x.query.scalar_type(), " like query");
    check_layout(name, tensor);
  });

  p.heads_q = x.query.size(1);
  p.heads_k = x.key.size(1);
  p.head_dim = x.query.size(rank - 1);
  p.value_dim = x.value.size(rank - 1);
  check(p.heads_k >= 1 && p.heads_q >= 1 && p.heads_q % p.heads_k == 0,
        "query: expected heads to be a multiple of the ", p.heads_k, " heads of key, got ", p.heads_q);
  const auto check_dim = [&](const char* name, std::int64_t dim) {
    check(dim >= row.head_dim_min && dim <= row.head_dim_max, name, " from ", row.head_dim_min, " to ",
          row.head_dim_max, " (", row.op, " on ", row.backend, "), got ", dim);
  };
  check_dim("query: expected head_dim", p.head_dim);
  check_dim("value: expected value_dim", p.value_dim);
  if (packed) {
    check_shape("key", x.key, {x.key.size(0), p.heads_k, p.head_dim});
    check_shape("value", x.value, {x.key.size(0), p.heads_k, p.value_dim});
  } else {
    p.batch = x.query.size(0);
    p.length_q = x.query.size(2);
    p.length_k = x.key.size(2);
    check_shape("key", x.key, {p.batch, p.heads_k, p.length_k, p.head_dim});
    check_shape("value", x.value, {p.batch, p.heads_k, p.length_k, p.value_dim});
  }
}

}  // namespace

Score read_score(const std::string& score) {
  const std::optional<Score> found = find_score(score);
  check(found.has_value(), "score: expected one of ", kScoreNames, ", got ", score);
  return *found;
}

void read_sink(const Sink& sink, AttentionParams& p) {
  if (!sink.tensor) return;
  const std::optional<Score> variant = find_variant(p.score, "sink");
  check(variant.has_value(), "sink: expected None with score ", score_name(p.score), ", got a tensor");
  p.score = *variant;
}

std::pair<std::int64_t, std::int64_t> read_packing(const Target& target, const PackedWithPadding& packed,
                                                   std::int64_t rows_q, std::int64_t rows_k) {
  const auto& [cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, has_padding] = packed;
  const std::int64_t length_q =
      read_offsets("cu_seqlens_q", cu_seqlens_q, rows_q, "max_seqlen_q", max_seqlen_q, has_padding, target);
  const std::int64_t length_k =
      read_offsets("cu_seqlens_k", cu_seqlens_k, rows_k, "max_seqlen_k", max_seqlen_k, has_padding, target);
  check_shape("cu_seqlens_k", cu_seqlens_k, {cu_seqlens_q.size(0)});
  return {length_q, length_k};
}

void read_inputs(const Target& target, const Inputs& x, const Packed* packed, AttentionParams& p) {
  const Capability& row = target.capability();
  check(lists(row.dtypes, dtype_of(x.query)), "query: expected one of ", row.dtypes, " (", row.op, " on ", row.backend,
        "), got ", dtype_of(x.query));
  p.dtype = to_dtype(x.query.scalar_type());
  read_shapes(x, packed, row, p);
  if (packed) read_packed(target, x, *packed, p);
  p.query = view_rows(x.query);
  p.key = view_rows(x.key);
  p.value = view_rows(x.value);
}

void read_key_lengths(const DenseWithLengths& dense, AttentionParams& p) {
  const auto& [seqused_k, leftpad_k] = dense;
  check(seqused_k.has_value() == leftpad_k.has_value(),
        "seqused_k, leftpad_k: expected both or neither, got one of them");
  if (!seqused_k) return;
  const auto read = [&](const char* name, const StableTensor& x) {
    check_dtype(name, x, ScalarType::Int, "");
    check_shape(name, x, {p.batch});
    check_contiguous(name, x);
    return data<const std::int32_t>(x);
  };
  p.key_ends = read("seqused_k", *seqused_k);
  p.key_starts = read("leftpad_k", *leftpad_k);
  const auto ends = values_on_host(*seqused_k), starts = values_on_host(*leftpad_k);
  if (!ends || !starts) return;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const std::int32_t start = data<const std::int32_t>(*starts)[b], end = data<const std::int32_t>(*ends)[b];
    check(end >= 0 && end <= p.length_k, "seqused_k: expected lengths from 0 to that of key, ", p.length_k, ", got ",
          end, " at ", b);
    check(start >= 0 && start <= end, "leftpad_k: expected starts from 0 to seqused_k, ", end, ", got ", start, " at ",
          b);
  }
}

double read_scale(const std::optional<double>& given, DType dtype, std::int64_t head_dim) {
  const double scale = given ? *given : 1 / std::sqrt(double(head_dim));
  check(std::isfinite(scale), "scale: expected a finite number, got ", scale);
  check(dtype == DType::kFloat64 || std::abs(scale) <= std::numeric_limits<float>::max(),
        "scale: expected a number in the range of float32, got ", scale);
  return scale;
}

void read_window(const Window& window, AttentionParams& p) {
  p.scale = read_scale(window.scale, p.dtype, p.head_dim);
  check(window.window_left >= -1 && window.window_right >= -1,
        "window: expected -1 (no bound) or more on each side, got (", window.window_left, ", ", window.window_right,
        ")");
  p.window_left = window.window_left;
  p.window_right = window.is_causal ? 0 : window.window_right;
  p.position_offset = window.position_offset;
  constexpr std::int64_t kMostOffset = std::int64_t(1) << 28;  // positions are 32 bits wide on CUDA
  check(std::abs(p.position_offset) <= kMostOffset, "position_offset: expected at most ", kMostOffset,
        " either way, got ", p.position_offset);
}

void read_bias(const std::string& rule, double value, AttentionParams& p) {
  check(rule == "none" || rule == "length" || rule == "row", "bias_rule: expected none, length or row, got ", rule);
  p.bias_rule = rule == "length" ? BiasRule::kLength : rule == "row" ? BiasRule::kRow : BiasRule::kNone;
  check(!std::isnan(value), "bias: expected a number, got nan");
  p.bias_value = value;
}

void check_block_size(const BlockSize& size) {
  for (const std::int64_t block : {size.block_q, size.block_k})
    check(block == 64 || block == 128, "block_size: expected 64 or 128 on each side, got (", size.block_q, ", ",
          size.block_k, ")");
}

void read_block_size(const BlockSize& size, AttentionParams& p) {
  check_block_size(size);
  p.block_q = size.block_q;
  p.block_k = size.block_k;
}

BlockShares read_shares(double critical, double negligible, std::string_view rounding, std::int64_t protect) {
  for (const auto& [name, share] : {std::pair("critical", critical), std::pair("negligible", negligible)})
    check(share >= 0 && share <= 1, name, ": expected a share of the blocks from 0 to 1, got ", share);
  check(critical + negligible <= 1, "critical, negligible: expected shares of at most 1 together, got ", critical,
        " + ", negligible);
  check(rounding == "ceil" || rounding == "floor", "rounding: expected ceil or floor, got ", rounding);
  check(protect >= 0, "protect: expected a number of keys, 0 or more, got ", protect);
  return {critical, negligible, rounding == "floor", protect};
}

namespace {

double number_of(const StableTensor& x, std::int64_t head) {
  const std::int64_t at = x.dim() == 0 ? 0 : head * x.stride(0);
  return x.scalar_type() == ScalarType::Double ? data<const double>(x)[at] : data<const float>(x)[at];
}

// A bias of -inf leaves a head without weights, and a sink of -inf is none; one of +inf takes all weight. What else is
// not finite makes NaN.
bool is_parameter(std::string_view name, double x) {
  if (name == "alibi_slopes") return std::isfinite(x);
  return name == "sink" ? !std::isnan(x) : x < HUGE_VAL;
}

}  // namespace

PerHead read_per_head(std::string_view name, const std::optional<StableTensor>& x, const StableTensor& query,
                      std::int64_t heads) {
  if (!x) return {};
  check_dtype(name, *x, sum_type(query), " (the type of the sums)");
  check(x->dim() == 0 || (x->dim() == 1 && x->size(0) == heads), name, ": expected shape () or (", heads,
        ",), one number per query head, got ", shape_of(*x));
  if (const auto values = values_on_host(*x)) {
    for (std::int64_t head = 0; head < values->numel(); ++head) {
      const double number = number_of(*values, head);
      check(is_parameter(name, number), name, ": expected a ", name == "alibi_slopes" ? "finite " : "",
            "number for each head, got ", number, " at ", head);
    }
  }
  return {x->data_ptr(), x->dim() == 0 ? 0 : x->stride(0)};
}

Tensor view_rows(const StableTensor& x) {
  if (x.dim() == 3) return {x.data_ptr(), 0, x.stride(1), x.stride(0)};
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Tensor view_logsumexp(const StableTensor& x) {
  if (x.dim() == 2) return {x.data_ptr(), 0, x.stride(0), x.stride(1)};
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

namespace {

std::int64_t stride_of(const StableTensor& x, std::int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

}  // namespace

BlockList view_lists(const StableTensor& counts, const StableTensor& indices) {
  BlockList list;
  list.counts = data<const std::int32_t>(counts);
  list.counts_batch_stride = stride_of(counts, 0);
  list.counts_head_stride = stride_of(counts, 1);
  list.indices = data<const std::int32_t>(indices);
  list.indices_batch_stride = stride_of(indices, 0);
  list.indices_head_stride = stride_of(indices, 1);
  list.indices_row_stride = indices.stride(2);
  list.width = indices.size(3);
  return list;
}

void add_per_block(const StableTensor& numbers, const float*& place, BlockList& list) {
  place = data<const float>(numbers);
  list.bias_batch_stride = stride_of(numbers, 0);
  list.bias_head_stride = stride_of(numbers, 1);
  list.bias_row_stride = numbers.stride(2);
}

std::int64_t blocks_of(std::int64_t length, std::int64_t block) { return length / block + (length % block != 0); }

}  // namespace attnx::ops
