// This file registers torch.ops.attnx.staircase_append_, staircase_crop_, staircase_assign_, staircase_dequantize and
// staircase_attention, which work on a KV cache of fewer and fewer bits.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "results.h"
#include "staircase_cache.h"
#include "staircase_hooks.h"
#include "staircase_lock.h"

namespace attnx::ops {

namespace {

std::int64_t units_to_write = -1;  // see interrupt_staircase_append

struct AppendedMemory {
  MutableTensor state, codes, ranges, tail;
  ATTNX_FIELDS(state, codes, ranges, tail)
};

struct NewTokens {
  StableTensor key, value;
  std::optional<StableTensor> counts;
  ATTNX_FIELDS(key, value, counts)
};

template <class Params>
Params params_of(const Cache& cache) {
  Params p;
  p.dtype = to_dtype(cache.dtype);
  p.batch = cache.batch;
  p.cache = cache.memory;
  return p;
}

void append(const AppendedMemory& memory, const NewTokens& x, const CacheLayout& layout) {
  const ChangingCache lock(memory.state);
  const Cache cache = read_cache(memory, layout);
  check_like_cache("key", x.key, cache);
  const std::int64_t tokens = x.key.size(2), max_length = layout.max_length;
  const Numbers counts = read_numbers("counts", x.counts, cache, tokens);
  for (std::int64_t b = 0; cache.state && counts.known() && b < cache.batch; ++b) {
    const std::int64_t n = counts[b], length = cache.state_of(b).length();
    check(n >= 0 && n <= tokens, "counts: expected from 0 to the length of key, ", tokens, ", got ", n, " at ", b);
    check(length + n <= max_length, "key: expected at most ", max_length - length, " more tokens, as max_length is ",
          max_length, " and sequence ", b, " has ", length, ", got ", n);
  }
  check_new_tokens("key", x.key, cache, tokens, counts);
  check_new_tokens("value", x.value, cache, tokens, counts);
  auto p = params_of<StaircaseAppendParams>(cache);
  p.tokens = tokens;
  p.counts = counts.address();
  p.key = view_rows(x.key);
  p.value = view_rows(x.value);
  p.most_units = units_to_write;
  run(p, cache.target);
  check(units_to_write < 0, "interrupted after ", units_to_write, " units, as a test asked for");
}

struct CroppedMemory {
  MutableTensor state;
  StableTensor codes, ranges;
  MutableTensor tail;
  ATTNX_FIELDS(state, codes, ranges, tail)
};

struct Kept {
  StableTensor length;
  ATTNX_FIELDS(length)
};

void crop(const CroppedMemory& memory, const Kept& kept, const CacheLayout& layout) {
  const ChangingCache lock(memory.state);
  const Cache cache = read_cache(memory, layout);
  const Numbers lengths = read_numbers("length", kept.length, cache, 0);
  for (std::int64_t b = 0; cache.state && lengths.known() && b < cache.batch; ++b) {
    const std::int64_t length = cache.state_of(b).length();
    check(lengths[b] >= -length && lengths[b] <= length, "length: expected from ", -length, " to the ", length,
          " tokens of sequence ", b, ", got ", lengths[b]);
  }
  auto p = params_of<StaircaseCropParams>(cache);
  p.lengths = lengths.address();
  run(p, cache.target);
}

struct NewMemory {
  StableTensor new_state, new_codes, new_ranges, new_tail;
  ATTNX_FIELDS(new_state, new_codes, new_ranges, new_tail)
};

// What was captured or compiled with the memory goes on with what is written to it here.
void assign(const AppendedMemory& memory, const NewMemory& x, const CacheLayout& layout) {
  const ChangingCache lock(memory.state);
  const Cache cache = read_cache(memory, layout);
  read_cache(x.new_state, x.new_codes, x.new_ranges, x.new_tail, layout);
  check_dtype("new_tail", x.new_tail, cache.dtype, " like the cache");
  check(x.new_tail.size(0) == cache.batch && x.new_tail.size(1) == cache.memory.heads &&
            x.new_tail.size(5) == cache.memory.layout.head_dim,
        "new_tail: expected shape ", shape_of(memory.tail), ", got ", shape_of(x.new_tail));
  const auto copy = [](StableTensor to, const StableTensor& from) {
    if (to.is_cpu())  // torch may find no memory halfway
      std::memmove(to.data_ptr(), from.data_ptr(), std::size_t(to.numel()) * to.element_size());
    else
      torch::stable::copy_(to, from);
  };
  copy(memory.state, x.new_state);
  copy(memory.codes, x.new_codes);
  copy(memory.ranges, x.new_ranges);
  copy(memory.tail, x.new_tail);
}

struct Range {
  std::int64_t first, count;
  ATTNX_FIELDS(first, count)
};

struct KeyAndValue {
  StableTensor key, value;
  ATTNX_FIELDS(key, value)
};

KeyAndValue dequantize(const CacheMemory& memory, const Range& range, const CacheLayout& layout) {
  const ReadingCache lock(memory.state);
  const Cache cache = read_cache(memory, layout);
  const auto& [first, count] = range;
  check(first >= 0 && first <= layout.max_length, "first: expected from 0 to ", layout.max_length, ", got ", first);
  check(count >= 0 && count <= layout.max_length - first, "count: expected from 0 to ", layout.max_length - first,
        ", got ", count);
  const std::vector shape{cache.batch, cache.memory.heads, count, cache.memory.layout.head_dim};
  const KeyAndValue result{make_zeros(memory.tail, shape), make_zeros(memory.tail, shape)};
  auto p = params_of<StaircaseReadParams>(cache);
  p.first = first;
  p.count = count;
  p.key = view_rows(result.key);
  p.value = view_rows(result.value);
  run(p, cache.target);
  return result;
}

struct Query {
  StableTensor query;
  ATTNX_FIELDS(query)
};

struct Additions {
  std::optional<StableTensor> query_lengths;
  Bias bias;
  ATTNX_FIELDS(query_lengths, bias)
};

void read_query(const StableTensor& query, const Cache& cache, ForwardParams& p) {
  check_like_cache("query", query, cache);
  p.dtype = to_dtype(cache.dtype);
  p.batch = cache.batch;
  p.heads_q = query.size(1);
  p.heads_k = cache.memory.heads;
  p.length_q = query.size(2);
  p.length_k = cache.length;
  p.head_dim = p.value_dim = cache.memory.layout.head_dim;
  check_shape("query", query, {p.batch, p.heads_q, p.length_q, p.head_dim});
  check(p.heads_q >= 1 && p.heads_q % p.heads_k == 0, "query: expected heads to be a multiple of the ", p.heads_k,
        " heads of the cache, got ", p.heads_q);
  check_layout("query", query);
  check(p.batch == 0 || p.length_k > 0, "cache: expected at least one token, got an empty cache");
  p.query = view_rows(query);
  p.cache = &cache.memory;
}

Outputs attend(const Query& x, const CacheMemory& memory, const Additions& additions, const CacheLayout& layout,
               const ScoreOptions& options, const Causal& causal) {
  const ReadingCache lock(memory.state);
  const Cache cache = read_cache(memory, layout);
  ForwardParams p;
  read_score(options, p);
  read_query(x.query, cache, p);
  read_window(causal, p);
  read_head_parameters(cache.target, additions, p);
  const Numbers lengths = read_numbers("query_lengths", additions.query_lengths, cache, p.length_q);
  for (std::int64_t b = 0; lengths.known() && b < cache.batch; ++b)
    check(lengths[b] >= 0 && lengths[b] <= p.length_q, "query_lengths: expected from 0 to the length of query, ",
          p.length_q, ", got ", lengths[b], " at ", b);
  p.query_lengths = lengths.address();
  // The kernel does not write rows beyond query_lengths, so they are zeroed here.
  Outputs y{empty_rows(x.query, p.value_dim), empty_logsumexp(x.query)};
  p.output = view_rows(y.output);
  p.logsumexp = view_logsumexp(y.logsumexp);
  if (p.query_lengths) torch::stable::zero_(y.output);
  if (p.query_lengths || !is_normalised(p.score)) torch::stable::zero_(y.logsumexp);
  run(p, cache.target);
  return y;
}

const Registration registration("staircase_attention", OnHost::kServed,
                                {define<append>("staircase_append_"), define<crop>("staircase_crop_"),
                                 define<assign>("staircase_assign_"), define<dequantize>("staircase_dequantize"),
                                 define<attend>("staircase_attention")});

}  // namespace

void interrupt_staircase_append(std::int64_t units) { units_to_write = units; }

}  // namespace attnx::ops
