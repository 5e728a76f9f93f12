// This says how the state of a sequence in a staircase cache moves on when tokens come or go, which is the same for the
// CPU and the GPU. New windows go to slots that the present state does not read, and a new tail to the other one of its
// two slots: so a call that fails before it publishes the next state leaves the cache as it was.
#pragma once

#include "attnx/staircase.h"

namespace attnx {

// It tells whether a state is one that the functions below lead to.
ATTNX_HOST_DEVICE inline bool is_reachable(const StaircaseLayout& layout, std::int64_t max_length,
                                           const StaircaseState& state) {
  const std::int64_t length = state.length();
  if (length < 0 || length > max_length || state.tail() < 0 || state.tail() > 1) return false;
  std::int64_t most_refined = layout.windows_of(length);
  for (int p = 1; p < layout.planes; ++p) {
    const StaircasePlane& plane = layout.plane[p];
    const std::int64_t slots = plane.slots > 1 ? plane.slots : 1;
    if (state.newest(p) < 0 || state.newest(p) >= slots) return false;
    if (most_refined > plane.windows) most_refined = plane.windows;
    if (state.refined(p) < 0 || state.refined(p) > most_refined) return false;
    most_refined = state.refined(p);
  }
  return true;
}

// It writes the state after `tokens` more.
ATTNX_HOST_DEVICE inline void next_state_of_append(const StaircaseLayout& layout, const StaircaseState& state,
                                                   std::int64_t tokens, std::int64_t* next) {
  const std::int64_t full = layout.windows_of(state.length() + tokens) - layout.windows_of(state.length());
  next[0] = state.length() + tokens;
  next[1] = full > 0 ? 1 - state.tail() : state.tail();
  for (int p = 1; p < layout.planes; ++p) {
    const StaircasePlane& plane = layout.plane[p];
    std::int64_t newest = state.newest(p), refined = state.refined(p);
    if (full > 0 && plane.slots > 0) {
      newest = (newest + (full < plane.windows ? full : plane.windows)) % plane.slots;
      refined = refined + full < plane.windows ? refined + full : plane.windows;
    }
    next[2 * p] = newest;
    next[2 * p + 1] = refined;
  }
}

// It returns how many tokens a crop leaves: so many, or, of a negative number, so many fewer than there are.
ATTNX_HOST_DEVICE inline std::int64_t tokens_to_keep(const StaircaseState& state, std::int64_t length) {
  return length < 0 ? state.length() + length : length;
}

// It writes the state when only the first `length` tokens stay.
ATTNX_HOST_DEVICE inline void next_state_of_crop(const StaircaseLayout& layout, const StaircaseState& state,
                                                 std::int64_t length, std::int64_t* next) {
  const std::int64_t dropped = layout.windows_of(state.length()) - layout.windows_of(length);
  next[0] = length;
  next[1] = dropped > 0 ? 1 - state.tail() : state.tail();
  for (int p = 1; p < layout.planes; ++p) {
    const std::int64_t slots = layout.plane[p].slots;
    std::int64_t newest = state.newest(p), refined = state.refined(p);
    if (dropped > 0 && slots > 0) {
      newest = ((newest - dropped) % slots + slots) % slots;
      refined = refined > dropped ? refined - dropped : 0;
    }
    next[2 * p] = newest;
    next[2 * p + 1] = refined;
  }
}

}  // namespace attnx
