// These read a staircase cache among the arguments of an operator, and arguments that have a number for each of its
// sequences.
#pragma once

#include "attnx/staircase_state.h"
#include "backend.h"
#include "operator.h"

namespace attnx::ops {

// This says how the memory of a cache is laid out.
struct CacheLayout {
  std::vector<std::int64_t> levels;
  std::int64_t window, group, residual, max_length;
  ATTNX_FIELDS(levels, window, group, residual, max_length)
};

struct CacheMemory {
  StableTensor state, codes, ranges, tail;
  ATTNX_FIELDS(state, codes, ranges, tail)
};

struct Cache {
  Staircase memory;
  Target target;
  ScalarType dtype;
  std::int64_t batch, length = 0;          // no sequence is longer
  std::optional<StableTensor> state = {};  // on the host, where it is known there

  StaircaseState state_of(std::int64_t b) const {
    return {data<const std::int64_t>(*state) + b * memory.layout.state_size()};
  }
};

// The tail must outlive the cache, whose target it is.
Cache read_cache(const StableTensor& state, const StableTensor& codes, const StableTensor& ranges,
                 const StableTensor& tail, const CacheLayout& layout);
template <class Memory>
Cache read_cache(const Memory& m, const CacheLayout& layout) {
  return read_cache(m.state, m.codes, m.ranges, m.tail, layout);
}

// It checks that a tensor beside the cache has four dimensions, the dtype of the cache and its device.
void check_like_cache(const char* name, const StableTensor& x, const Cache& cache);

// This is a number for each sequence, or the same for all.
struct Numbers {
  std::optional<StableTensor> tensor = {}, values = {};  // the latter on the host, where they are known there
  std::int64_t otherwise = 0;

  // It is null where all have the same number.
  const std::int64_t* address() const { return tensor ? data<std::int64_t>(*tensor) : nullptr; }
  // It tells whether all are known on the host.
  bool known() const { return !tensor || values; }
  std::int64_t operator[](std::int64_t b) const { return tensor ? data<std::int64_t>(*values)[b] : otherwise; }
};
Numbers read_numbers(const char* name, const std::optional<StableTensor>& x, const Cache& cache,
                     std::int64_t otherwise);

// It checks new keys or values, of which each sequence gets the first `counts`.
void check_new_tokens(const char* name, const StableTensor& x, const Cache& cache, std::int64_t tokens,
                      const Numbers& counts);

}  // namespace attnx::ops
