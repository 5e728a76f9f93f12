#include "staircase_cache.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "attnx/capability.h"

namespace attnx::ops {

namespace {

// Larger ones would have the sizes of memory overflow.
constexpr std::int64_t kMaxWindow = std::int64_t(1) << 30, kMaxResidual = kMaxWindow;

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

void check_memory(const char* name, const StableTensor& x, ScalarType dtype,
                  std::initializer_list<std::int64_t> shape) {
  check_dtype(name, x, dtype, "");
  check_shape(name, x, shape);
  check(x.is_contiguous(), name, ": expected a contiguous tensor");
}

// It finds the longest sequence.
void read_state(const StableTensor& state, std::int64_t max_length, Cache& cache) {
  cache.state = values_on_host(state);
  if (!cache.state) cache.length = max_length;
  for (std::int64_t b = 0; cache.state && b < cache.batch; ++b) {
    check(is_reachable(cache.memory.layout, max_length, cache.state_of(b)),
          "state: expected what the operators of the cache left, got something else for sequence ", b);
    cache.length = std::max(cache.length, cache.state_of(b).length());
  }
}

// It tells whether no |x| has bits above `limit`, those of the largest number that is in the range of float16. Numbers
// beyond 65504, infinities and NaN have bits above it.
template <class Bits>
bool all_below(const Bits* x, std::int64_t n, Bits limit) {
  constexpr Bits kMagnitude = Bits(~Bits(0)) >> 1;
  bool ok = true;
  for (std::int64_t i = 0; i < n; ++i) ok &= (x[i] & kMagnitude) <= limit;
  return ok;
}

bool in_range(const StableTensor& x, std::int64_t offset, std::int64_t n) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return all_below<std::uint16_t>(data<const std::uint16_t>(x) + offset, n, 0x477f);
    case ScalarType::Half: return all_below<std::uint16_t>(data<const std::uint16_t>(x) + offset, n, 0x7bff);
    default: return all_below<std::uint32_t>(data<const std::uint32_t>(x) + offset, n, 0x477fe000);
  }
}

}  // namespace

Cache read_cache(const StableTensor& state, const StableTensor& codes, const StableTensor& ranges,
                 const StableTensor& tail, const CacheLayout& l) {
  check_levels(l.levels);
  check(l.group >= 32 && l.group % 32 == 0, "group: expected a multiple of 32, got ", l.group);
  check(l.window >= l.group && l.window <= kMaxWindow && l.window % l.group == 0,
        "window: expected a multiple of group, ", l.group, ", at most ", kMaxWindow, ", got ", l.window);
  check(l.residual >= 0 && l.residual <= kMaxResidual, "residual: expected from 0 to ", kMaxResidual, ", got ",
        l.residual);
  check(l.max_length >= 1, "max_length: expected at least 1, got ", l.max_length);
  check_length("max_length", l.max_length);
  const Target target{"staircase_attention", tail};
  const Capability& row = target.capability();
  check(lists(row.dtypes, dtype_of(tail)), "dtype: expected one of ", row.dtypes, " (", row.op, " on ", row.backend,
        "), got ", dtype_of(tail));
  check(tail.dim() == 6, "tail: expected 6 dimensions, got shape ", shape_of(tail));
  const std::int64_t batch = tail.size(0), heads = tail.size(1), head_dim = tail.size(5);
  check(heads >= 1, "tail: expected at least 1 head, got shape ", shape_of(tail));
  check(head_dim >= row.head_dim_min && head_dim <= row.head_dim_max, "head_dim: expected from ", row.head_dim_min,
        " to ", row.head_dim_max, " (", row.op, " on ", row.backend, "), got ", head_dim);
  check(head_dim % l.group == 0, "head_dim: expected a multiple of group, ", l.group, ", got ", head_dim);

  Staircase m;
  m.layout =
      StaircaseLayout(l.levels.data(), int(l.levels.size()), l.window, l.group, l.residual, head_dim, l.max_length);
  m.heads = heads;
  check_memory("state", state, ScalarType::Long, {batch, m.layout.state_size()});
  check_memory("codes", codes, ScalarType::Int, {batch, heads, 2, m.layout.words});
  check_memory("ranges", ranges, ScalarType::Half,
               {batch, heads, 2, m.layout.max_windows, m.layout.window_ranges(), 2});
  check_memory("tail", tail, tail.scalar_type(),
               {batch, heads, 2, StaircaseLayout::kTailSlots, m.layout.tail_tokens(), head_dim});
  m.state = data<std::int64_t>(state);
  m.codes = data<std::uint32_t>(codes);
  m.ranges = data<std::uint16_t>(ranges);
  m.tail = tail.data_ptr();
  Cache cache{m, target, tail.scalar_type(), batch};
  read_state(state, l.max_length, cache);
  return cache;
}

void check_like_cache(const char* name, const StableTensor& x, const Cache& cache) {
  check(x.dim() == 4, name, ": expected 4 dimensions, (batch, heads, length, head_dim), got shape ", shape_of(x));
  check_dtype(name, x, cache.dtype, " like the cache");
}

Numbers read_numbers(const char* name, const std::optional<StableTensor>& x, const Cache& cache,
                     std::int64_t otherwise) {
  if (!x) return {{}, {}, otherwise};
  check_dtype(name, *x, ScalarType::Long, "");
  check_shape(name, *x, {cache.batch});
  const StableTensor numbers = make_contiguous(*x);
  return {numbers, values_on_host(numbers), otherwise};
}

void check_new_tokens(const char* name, const StableTensor& x, const Cache& cache, std::int64_t tokens,
                      const Numbers& counts) {
  check_like_cache(name, x, cache);
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

}  // namespace attnx::ops
