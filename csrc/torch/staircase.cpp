// torch.ops.attnx.staircase_append_, staircase_crop_, staircase_dequantize and staircase_attention: a KV cache of
// fewer and fewer bits. What is appended is written first, and the state that makes it count last.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "arguments.h"
#include "attnx/capability.h"
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
  std::int64_t batch, length = 0;  // the longest sequence
  Staircase memory;
};

DType dtype_for(const StableTensor& tail) {
  switch (tail.scalar_type()) {
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: return DType::kFloat32;
  }
}

void check_contiguous(const char* name, const StableTensor& x, ScalarType dtype, const StableTensor& tail,
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

  Cache cache{dtype_for(t.tail), t.tail.scalar_type(), batch, 0, {}};
  Staircase& m = cache.memory;
  m.layout = StaircaseLayout(t.levels.data(), int(t.levels.size()), t.window, t.group, head_dim, t.max_length);
  m.heads = heads;
  const StaircaseLayout& layout = m.layout;
  check_contiguous("state", t.state, ScalarType::Long, t.tail, {batch, layout.state_size()});
  check_contiguous("codes", t.codes, ScalarType::Int, t.tail, {batch, heads, 2, layout.words});
  check_contiguous("ranges", t.ranges, ScalarType::Half, t.tail,
                   {batch, heads, 2, layout.max_windows, layout.window_ranges(), 2});
  check_contiguous("tail", t.tail, t.tail.scalar_type(), t.tail,
                   {batch, heads, 2, StaircaseLayout::kTailSlots, t.window, head_dim});
  m.state = static_cast<std::int64_t*>(t.state.data_ptr());
  m.codes = static_cast<std::uint32_t*>(t.codes.data_ptr());
  m.ranges = static_cast<std::uint16_t*>(t.ranges.data_ptr());
  m.tail = t.tail.data_ptr();
  for (std::int64_t b = 0; b < batch; ++b) {
    const StaircaseState s = m.of(b);
    bool ok = s.length() >= 0 && s.length() <= t.max_length && (s.tail() == 0 || s.tail() == 1);
    for (int p = 1; p < layout.planes; ++p)
      ok = ok && s.newest(p) >= 0 && s.newest(p) < std::max<std::int64_t>(layout.plane[p].slots, 1) &&
           s.refined(p) >= 0 && s.refined(p) <= std::min(layout.plane[p].windows, s.length() / t.window) &&
           (p == 1 || s.refined(p) <= s.refined(p - 1));
    check(ok, "state: expected what the operators of the cache left, got something else for sequence ", b);
    cache.length = std::max(cache.length, s.length());
  }
  return cache;
}

// A number for each sequence, or the same for all.
std::vector<std::int64_t> read_numbers(const char* name, const std::optional<StableTensor>& x, const Cache& cache,
                                       std::int64_t otherwise) {
  std::vector<std::int64_t> numbers(std::size_t(cache.batch), otherwise);
  if (!x) return numbers;
  check_dtype(name, *x, ScalarType::Long, "");
  check_shape(name, *x, {cache.batch});
  check(x->is_cpu(), name, ": expected a tensor on cpu, got one on ", device_of(*x));
  for (std::int64_t b = 0; b < cache.batch; ++b)
    numbers[std::size_t(b)] = static_cast<const std::int64_t*>(x->data_ptr())[b * x->stride(0)];
  return numbers;
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
               const std::vector<std::int64_t>& counts) {
  check(x.dim() == 4, name, ": expected 4 dimensions, (batch, heads, length, head_dim), got shape ", shape_of(x));
  check_dtype(name, x, cache.scalar_type, " like the cache");
  check(x.is_cpu(), name, ": expected a tensor on cpu like the cache, got one on ", device_of(x));
  check_shape(name, x, {cache.batch, cache.memory.heads, tokens, cache.memory.layout.head_dim});
  check_layout(name, x);
  for (std::int64_t b = 0; b < cache.batch; ++b)
    for (std::int64_t h = 0; h < x.size(1); ++h)
      for (std::int64_t t = 0; t < counts[std::size_t(b)]; ++t)
        check(in_range(x, b * x.stride(0) + h * x.stride(1) + t * x.stride(2), x.size(3)), name,
              ": expected finite numbers of a magnitude up to 65504, got others at (", b, ", ", h, ", ", t, ")");
}

void publish(const Cache& cache, const std::vector<std::int64_t>& next) {
  if (!next.empty()) std::memcpy(cache.memory.state, next.data(), next.size() * sizeof next[0]);
}

void staircase_append(StableTensor state, StableTensor codes, StableTensor ranges, StableTensor tail,
                      const StableTensor& key, const StableTensor& value, const std::optional<StableTensor>& counts,
                      const std::vector<std::int64_t>& levels, std::int64_t window, std::int64_t group,
                      std::int64_t max_length) {
  const Cache cache = read_cache({state, codes, ranges, tail, levels, window, group, max_length});
  check(key.dim() == 4, "key: expected 4 dimensions, (batch, heads, length, head_dim), got shape ", shape_of(key));
  const std::int64_t tokens = key.size(2);
  const std::vector<std::int64_t> new_tokens = read_numbers("counts", counts, cache, tokens);
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    const std::int64_t n = new_tokens[std::size_t(b)], length = cache.memory.of(b).length();
    check(n >= 0 && n <= tokens, "counts: expected from 0 to the length of key, ", tokens, ", got ", n, " at ", b);
    check(length + n <= max_length, "key: expected at most ", max_length - length, " more tokens, as max_length is ",
          max_length, " and sequence ", b, " has ", length, ", got ", n);
  }
  check_new("key", key, cache, tokens, new_tokens);
  check_new("value", value, cache, tokens, new_tokens);

  const StaircaseLayout& layout = cache.memory.layout;
  std::vector<std::int64_t> next(cache.memory.state, cache.memory.state + cache.batch * layout.state_size());
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    std::int64_t* const s = next.data() + b * layout.state_size();
    const std::int64_t length = s[0] + new_tokens[std::size_t(b)], full = length / window - s[0] / window;
    s[0] = length;
    if (full == 0) continue;
    s[1] = 1 - s[1];
    for (int p = 1; p < layout.planes; ++p) {
      const StaircasePlane& plane = layout.plane[p];
      if (plane.slots == 0) continue;
      s[2 * p] = (s[2 * p] + std::min(full, plane.windows)) % plane.slots;
      s[2 * p + 1] = std::min(s[2 * p + 1] + full, plane.windows);
    }
  }
  StaircaseAppendParams p;
  p.dtype = cache.dtype;
  p.batch = cache.batch;
  p.cache = cache.memory;
  p.next_state = next.data();
  p.key = view_rows(key);
  p.value = view_rows(value);
  p.most_units = units_to_write;
  run(p);
  check(units_to_write < 0, "interrupted after ", units_to_write, " units, as a test asked for");
  publish(cache, next);
}

void staircase_crop(StableTensor state, const StableTensor& codes, const StableTensor& ranges, StableTensor tail,
                    const StableTensor& lengths, const std::vector<std::int64_t>& levels, std::int64_t window,
                    std::int64_t group, std::int64_t max_length) {
  const Cache cache = read_cache({state, codes, ranges, tail, levels, window, group, max_length});
  const std::vector<std::int64_t> kept = read_numbers("length", lengths, cache, 0);
  const StaircaseLayout& layout = cache.memory.layout;
  std::vector<std::int64_t> next(cache.memory.state, cache.memory.state + cache.batch * layout.state_size());
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    std::int64_t* const s = next.data() + b * layout.state_size();
    const std::int64_t length = kept[std::size_t(b)];
    check(length >= 0 && length <= s[0], "length: expected from 0 to the ", s[0], " tokens of sequence ", b, ", got ",
          length);
    const std::int64_t dropped = s[0] / window - length / window;
    s[0] = length;
    if (dropped == 0) continue;
    s[1] = 1 - s[1];
    for (int p = 1; p < layout.planes; ++p) {
      const std::int64_t slots = layout.plane[p].slots;
      if (slots == 0) continue;
      s[2 * p] = ((s[2 * p] - dropped) % slots + slots) % slots;
      s[2 * p + 1] = std::max<std::int64_t>(s[2 * p + 1] - dropped, 0);
    }
  }
  run(StaircaseCropParams{cache.dtype, cache.batch, cache.memory, next.data()});
  publish(cache, next);
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
  check(query.is_cpu(), "query: expected a tensor on cpu like the cache, got one on ", device_of(query));
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
  const std::vector<std::int64_t> lengths = read_numbers("query_lengths", query_lengths, cache, p.length_q);
  for (std::int64_t b = 0; b < cache.batch; ++b)
    check(lengths[std::size_t(b)] >= 0 && lengths[std::size_t(b)] <= p.length_q,
          "query_lengths: expected from 0 to the length of query, ", p.length_q, ", got ", lengths[std::size_t(b)],
          " at ", b);
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
