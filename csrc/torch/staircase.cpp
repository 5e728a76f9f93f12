// torch.ops.attnx.staircase_append_, staircase_crop_, staircase_dequantize and staircase_attention: a KV cache of
// fewer and fewer bits. What is appended is written first, and the state that makes it count last.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "attnx/capability.h"
#include "attnx/staircase_state.h"
#include "backend.h"
#include "staircase_hooks.h"

namespace attnx::ops {

namespace {

constexpr const char* kOperator = "staircase_attention";

std::int64_t units_to_write = -1;  // see interrupt_staircase_append

struct CacheTensors {
  const StableTensor &state, &codes, &ranges, &tail;
  const std::vector<std::int64_t>& levels;
  std::int64_t window, group, max_length;
};

std::string to_text(const std::vector<std::int64_t>& levels) {
  std::string text;
  for (const std::int64_t level : levels) text += (text.empty() ? "" : ", ") + std::to_string(level);
  return "(" + text + (levels.size() == 1 ? ",)" : ")");
}

void check_levels(const std::vector<std::int64_t>& levels) {
  const auto is_width = [](std::int64_t n) { return n == 8 || n == 4 || n == 2 || n == 1; };
  const bool ok = levels.size() >= 2 && levels.size() <= StaircaseLayout::kMaxLevels && levels[0] == 16 &&
                  std::all_of(levels.begin() + 1, levels.end(), is_width) &&
                  std::is_sorted(levels.rbegin(), levels.rend());
  check(ok, "levels: expected 16, then at least one of 8, 4, 2 and 1, none larger than the one before, at most ",
        StaircaseLayout::kMaxLevels, " in all, got ", to_text(levels));
}

struct Cache {
  DType dtype;
  ScalarType scalar_type;
  std::int64_t batch, length = 0;  // no sequence is longer
  Staircase memory;
  std::string device;
  std::optional<StableTensor> state = {};  // on the host, where it is known there

  StaircaseState state_of(std::int64_t b) const {
    return {static_cast<const std::int64_t*>(state->data_ptr()) + b * memory.layout.state_size()};
  }
};

DType dtype_for(const StableTensor& tail) {
  switch (tail.scalar_type()) {
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: return DType::kFloat32;
  }
}

void check_memory(const char* name, const StableTensor& x, ScalarType dtype, const StableTensor& tail,
                  std::initializer_list<std::int64_t> shape) {
  check_dtype(name, x, dtype, "");
  check_shape(name, x, shape);
  check(device_of(x) == device_of(tail), name, ": expected a tensor on ", device_of(tail), " like tail, got one on ",
        device_of(x));
  check(x.is_contiguous(), name, ": expected a contiguous tensor");
}

Cache read_cache(const CacheTensors& t) {
  check_levels(t.levels);
  check(t.group >= 32 && t.group % 32 == 0, "group: expected a multiple of 32, got ", t.group);
  check(t.window >= t.group && t.window % t.group == 0, "window: expected a multiple of group, ", t.group, ", got ",
        t.window);
  check(t.max_length >= 1, "max_length: expected at least 1, got ", t.max_length);
  const Capability& row = *find_capability(kOperator, "cpu");
  check(lists(row.dtypes, dtype_of(t.tail)), "dtype: expected one of ", row.dtypes, " (", row.op, " on ", row.backend,
        "), got ", dtype_of(t.tail));
  check(t.tail.dim() == 6, "tail: expected 6 dimensions, got shape ", shape_of(t.tail));
  const std::int64_t batch = t.tail.size(0), heads = t.tail.size(1), head_dim = t.tail.size(5);
  check(head_dim >= row.head_dim_min && head_dim <= row.head_dim_max, "head_dim: expected from ", row.head_dim_min,
        " to ", row.head_dim_max, " (", row.op, " on ", row.backend, "), got ", head_dim);
  check(head_dim % t.group == 0, "head_dim: expected a multiple of group, ", t.group, ", got ", head_dim);

  Cache cache{dtype_for(t.tail), t.tail.scalar_type(), batch, 0, {}, device_of(t.tail)};
  Staircase& m = cache.memory;
  m.layout = StaircaseLayout(t.levels.data(), int(t.levels.size()), t.window, t.group, head_dim, t.max_length);
  m.heads = heads;
  const StaircaseLayout& layout = m.layout;
  check_memory("state", t.state, ScalarType::Long, t.tail, {batch, layout.state_size()});
  check_memory("codes", t.codes, ScalarType::Int, t.tail, {batch, heads, 2, layout.words});
  check_memory("ranges", t.ranges, ScalarType::Half, t.tail,
               {batch, heads, 2, layout.max_windows, layout.window_ranges(), 2});
  check_memory("tail", t.tail, t.tail.scalar_type(), t.tail,
               {batch, heads, 2, StaircaseLayout::kTailSlots, t.window, head_dim});
  m.state = static_cast<std::int64_t*>(t.state.data_ptr());
  m.codes = static_cast<std::uint32_t*>(t.codes.data_ptr());
  m.ranges = static_cast<std::uint16_t*>(t.ranges.data_ptr());
  m.tail = t.tail.data_ptr();
  cache.state = values_on_host(t.state);
  if (!cache.state) cache.length = t.max_length;
  for (std::int64_t b = 0; cache.state && b < batch; ++b) {
    check(is_reachable(layout, t.max_length, cache.state_of(b)),
          "state: expected what the operators of the cache left, got something else for sequence ", b);
    cache.length = std::max(cache.length, cache.state_of(b).length());
  }
  return cache;
}

// A number for each sequence, or the same for all.
struct Numbers {
  std::optional<StableTensor> tensor = {}, values = {};  // the latter on the host, where they are known there
  std::int64_t otherwise = 0;

  const std::int64_t* data() const { return tensor ? static_cast<const std::int64_t*>(tensor->data_ptr()) : nullptr; }
  // Whether all are known on the host.
  bool known() const { return !tensor || values; }
  std::int64_t operator[](std::int64_t b) const {
    return tensor ? static_cast<const std::int64_t*>(values->data_ptr())[b] : otherwise;
  }
};

Numbers read_numbers(const char* name, const std::optional<StableTensor>& x, const Cache& cache,
                     std::int64_t otherwise) {
  if (!x) return {{}, {}, otherwise};
  check_dtype(name, *x, ScalarType::Long, "");
  check_shape(name, *x, {cache.batch});
  check(device_of(*x) == cache.device, name, ": expected a tensor on ", cache.device, ", got one on ", device_of(*x));
  const StableTensor numbers = torch::stable::contiguous(*x);
  return {numbers, values_on_host(numbers), otherwise};
}

// The smallest bits of |x| that stand for no number of a float16 range: beyond 65504, infinite, or NaN.
template <class Bits>
bool all_below(const Bits* x, std::int64_t n, Bits limit) {
  constexpr Bits kMagnitude = Bits(~Bits(0)) >> 1;
  bool ok = true;
  for (std::int64_t i = 0; i < n; ++i) ok &= (x[i] & kMagnitude) <= limit;
  return ok;
}

bool in_range(const StableTensor& x, std::int64_t offset, std::int64_t n) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return all_below<std::uint16_t>(static_cast<const std::uint16_t*>(x.data_ptr()) + offset, n, 0x477f);
    case ScalarType::Half:
      return all_below<std::uint16_t>(static_cast<const std::uint16_t*>(x.data_ptr()) + offset, n, 0x7bff);
    default: return all_below<std::uint32_t>(static_cast<const std::uint32_t*>(x.data_ptr()) + offset, n, 0x477fe000);
  }
}

void check_new(const char* name, const StableTensor& x, const Cache& cache, std::int64_t tokens,
               const Numbers& counts) {
  check(x.dim() == 4, name, ": expected 4 dimensions, (batch, heads, length, head_dim), got shape ", shape_of(x));
  check_dtype(name, x, cache.scalar_type, " like the cache");
  check(device_of(x) == cache.device, name, ": expected a tensor on ", cache.device, " like the cache, got one on ",
        device_of(x));
  check_shape(name, x, {cache.batch, cache.memory.heads, tokens, cache.memory.layout.head_dim});
  check_layout(name, x);
  const auto values = values_on_host(x);
  if (!values || !counts.known()) return;
  for (std::int64_t b = 0; b < cache.batch; ++b)
    for (std::int64_t h = 0; h < values->size(1); ++h)
      for (std::int64_t t = 0; t < counts[b]; ++t)
        check(in_range(*values, b * values->stride(0) + h * values->stride(1) + t * values->stride(2), values->size(3)),
              name, ": expected finite numbers of a magnitude up to 65504, got others at (", b, ", ", h, ", ", t, ")");
}

void staircase_append(StableTensor state, StableTensor codes, StableTensor ranges, StableTensor tail,
                      const StableTensor& key, const StableTensor& value, const std::optional<StableTensor>& counts,
                      const std::vector<std::int64_t>& levels, std::int64_t window, std::int64_t group,
                      std::int64_t max_length) {
  const Cache cache = read_cache({state, codes, ranges, tail, levels, window, group, max_length});
  check(key.dim() == 4, "key: expected 4 dimensions, (batch, heads, length, head_dim), got shape ", shape_of(key));
  const std::int64_t tokens = key.size(2);
  const Numbers new_tokens = read_numbers("counts", counts, cache, tokens);
  for (std::int64_t b = 0; cache.state && new_tokens.known() && b < cache.batch; ++b) {
    const std::int64_t n = new_tokens[b], length = cache.state_of(b).length();
    check(n >= 0 && n <= tokens, "counts: expected from 0 to the length of key, ", tokens, ", got ", n, " at ", b);
    check(length + n <= max_length, "key: expected at most ", max_length - length, " more tokens, as max_length is ",
          max_length, " and sequence ", b, " has ", length, ", got ", n);
  }
  check_new("key", key, cache, tokens, new_tokens);
  check_new("value", value, cache, tokens, new_tokens);

  StaircaseAppendParams p;
  p.dtype = cache.dtype;
  p.batch = cache.batch;
  p.cache = cache.memory;
  p.tokens = tokens;
  p.counts = new_tokens.data();
  p.key = view_rows(key);
  p.value = view_rows(value);
  p.most_units = units_to_write;
  run(p);
  check(units_to_write < 0, "interrupted after ", units_to_write, " units, as a test asked for");
}

void staircase_crop(StableTensor state, const StableTensor& codes, const StableTensor& ranges, StableTensor tail,
                    const StableTensor& lengths, const std::vector<std::int64_t>& levels, std::int64_t window,
                    std::int64_t group, std::int64_t max_length) {
  const Cache cache = read_cache({state, codes, ranges, tail, levels, window, group, max_length});
  const Numbers kept = read_numbers("length", lengths, cache, 0);
  for (std::int64_t b = 0; cache.state && kept.known() && b < cache.batch; ++b) {
    const std::int64_t length = cache.state_of(b).length();
    check(kept[b] >= 0 && kept[b] <= length, "length: expected from 0 to the ", length, " tokens of sequence ", b,
          ", got ", kept[b]);
  }
  StaircaseCropParams p;
  p.dtype = cache.dtype;
  p.batch = cache.batch;
  p.cache = cache.memory;
  p.lengths = kept.data();
  run(p);
}

using Pair = std::tuple<StableTensor, StableTensor>;

Pair staircase_dequantize(const StableTensor& state, const StableTensor& codes, const StableTensor& ranges,
                          const StableTensor& tail, std::int64_t first, std::int64_t count,
                          const std::vector<std::int64_t>& levels, std::int64_t window, std::int64_t group,
                          std::int64_t max_length) {
  const Cache cache = read_cache({state, codes, ranges, tail, levels, window, group, max_length});
  check(first >= 0, "first: expected at least 0, got ", first);
  check(count >= 0 && first + count <= max_length, "count: expected from 0 to ", max_length - first, ", got ", count);
  const std::vector shape{cache.batch, cache.memory.heads, count, cache.memory.layout.head_dim};
  StableTensor key = torch::stable::new_zeros(tail, shape), value = torch::stable::new_zeros(tail, shape);
  StaircaseReadParams p;
  p.dtype = cache.dtype;
  p.batch = cache.batch;
  p.first = first;
  p.count = count;
  p.cache = cache.memory;
  p.key = view_rows(key);
  p.value = view_rows(value);
  run(p);
  return {key, value};
}

Pair staircase_attention(const StableTensor& query, const StableTensor& state, const StableTensor& codes,
                         const StableTensor& ranges, const StableTensor& tail,
                         const std::optional<StableTensor>& query_lengths, const std::optional<StableTensor>& bias,
                         const std::vector<std::int64_t>& levels, std::int64_t window, std::int64_t group,
                         std::int64_t max_length, const std::string& score, const std::string& bias_rule,
                         double bias_value, std::optional<double> scale, bool is_causal) {
  const Cache cache = read_cache({state, codes, ranges, tail, levels, window, group, max_length});
  const StaircaseLayout& layout = cache.memory.layout;
  check(query.dim() == 4, "query: expected 4 dimensions, (batch, heads, length, head_dim), got shape ",
        shape_of(query));
  check_dtype("query", query, cache.scalar_type, " like the cache");
  check(device_of(query) == cache.device, "query: expected a tensor on ", cache.device, " like the cache, got one on ",
        device_of(query));
  check_shape("query", query, {cache.batch, query.size(1), query.size(2), layout.head_dim});
  check(query.size(1) >= 1 && query.size(1) % cache.memory.heads == 0, "query: expected heads to be a multiple of the ",
        cache.memory.heads, " heads of the cache, got ", query.size(1));
  check_layout("query", query);
  check(score == "sigmoid" || score == "softmax", "score: expected sigmoid or softmax, got ", score);
  check(cache.batch == 0 || cache.length > 0, "cache: expected at least one token, got an empty cache");

  ForwardParams p;
  p.dtype = cache.dtype;
  p.score = score == "sigmoid" ? Score::kSigmoid : Score::kSoftmax;
  p.batch = cache.batch;
  p.heads_q = query.size(1);
  p.heads_k = cache.memory.heads;
  p.length_q = query.size(2);
  p.length_k = cache.length;
  p.head_dim = p.value_dim = layout.head_dim;
  p.query = view_rows(query);
  p.scale = scale ? *scale : 1 / std::sqrt(double(p.head_dim));
  check(std::isfinite(p.scale), "scale: expected a finite number, got ", p.scale);
  p.window_right = is_causal ? 0 : -1;
  p.cache = &cache.memory;
  read_bias(bias, bias_rule, bias_value, query, p);
  const Numbers lengths = read_numbers("query_lengths", query_lengths, cache, p.length_q);
  for (std::int64_t b = 0; lengths.known() && b < cache.batch; ++b)
    check(lengths[b] >= 0 && lengths[b] <= p.length_q, "query_lengths: expected from 0 to the length of query, ",
          p.length_q, ", got ", lengths[b], " at ", b);
  p.query_lengths = lengths.data();

  StableTensor output = empty_rows(query, p.value_dim), logsumexp = empty_logsumexp(query);
  p.output = view_rows(output);
  p.logsumexp = view_logsumexp(logsumexp);
  if (query_lengths) torch::stable::zero_(output);
  if (query_lengths || p.score == Score::kSigmoid) torch::stable::zero_(logsumexp);
  run_on_host(p);
  return {output, logsumexp};
}

}  // namespace

void interrupt_staircase_append(std::int64_t units) { units_to_write = units; }

#define ATTNX_CACHE "int[] levels, int window, int group, int max_length"

STABLE_TORCH_LIBRARY_FRAGMENT(attnx, m) {
  m.def(
      "staircase_append_(Tensor(a!) state, Tensor(b!) codes, Tensor(c!) ranges, Tensor(d!) tail, Tensor key, "
      "Tensor value, Tensor? counts, " ATTNX_CACHE ") -> ()");
  m.def("staircase_crop_(Tensor(a!) state, Tensor codes, Tensor ranges, Tensor(b!) tail, Tensor length, " ATTNX_CACHE
        ") -> ()");
  m.def(
      "staircase_dequantize(Tensor state, Tensor codes, Tensor ranges, Tensor tail, int first, int count, " ATTNX_CACHE
      ") -> (Tensor key, Tensor value)");
  m.def(
      "staircase_attention(Tensor query, Tensor state, Tensor codes, Tensor ranges, Tensor tail, "
      "Tensor? query_lengths, Tensor? bias, " ATTNX_CACHE
      ", str score, str bias_rule, float bias_value, float? scale, bool is_causal) -> (Tensor output, Tensor "
      "logsumexp)");
}

STABLE_TORCH_LIBRARY_IMPL(attnx, CPU, m) {
  m.impl("staircase_append_", TORCH_BOX(&staircase_append));
  m.impl("staircase_crop_", TORCH_BOX(&staircase_crop));
  m.impl("staircase_dequantize", TORCH_BOX(&staircase_dequantize));
  m.impl("staircase_attention", TORCH_BOX(&staircase_attention));
}

}  // namespace attnx::ops
