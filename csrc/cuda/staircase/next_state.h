// This finds the next state of a sequence on the device, where its present one and the numbers of an append or a crop
// are known. What does not fit changes nothing, as the host, which would refuse it, does not see it.
#pragma once

#include "attnx/params.h"
#include "attnx/staircase_state.h"

namespace attnx::cuda {

struct NextState {
  std::int64_t row[2 * StaircaseLayout::kMaxPlanes];

  __device__ operator StaircaseState() const { return {row}; }
};

__device__ inline NextState next_state(const StaircaseAppendParams& p, std::int64_t batch) {
  const StaircaseState state = p.cache.of(batch);
  const std::int64_t tokens = p.counts ? p.counts[batch] : p.tokens;
  const bool fits = tokens >= 0 && tokens <= p.tokens && tokens <= p.cache.layout.max_length - state.length();
  NextState next;
  next_state_of_append(p.cache.layout, state, fits ? tokens : 0, next.row);
  return next;
}

__device__ inline NextState next_state(const StaircaseCropParams& p, std::int64_t batch) {
  const StaircaseState state = p.cache.of(batch);
  const std::int64_t length = tokens_to_keep(state, p.lengths[batch]);
  NextState next;
  next_state_of_crop(p.cache.layout, state, length >= 0 && length <= state.length() ? length : state.length(),
                     next.row);
  return next;
}

}  // namespace attnx::cuda
