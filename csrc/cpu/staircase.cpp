// A staircase cache takes in, gives back and drops tokens here. All else is written first, and the states that make it
// count last.
#include <vector>

#include "attention.h"
#include "attnx/staircase_state.h"
#include "dispatch.h"

namespace attnx::cpu {

namespace {

// A number that is quantised or read takes as long as some 64 operations of attention.
template <class Params>
double operations(const Params& p, std::int64_t tokens) {
  return 64.0 * double(p.batch * p.cache.heads * tokens * p.cache.layout.head_dim);
}

// It returns the next state of every sequence, as advance(batch, state, next) writes it.
template <class Advance>
std::vector<std::int64_t> next_states(const Staircase& cache, std::int64_t batch, const Advance& advance) {
  const std::int64_t size = cache.layout.state_size();
  std::vector<std::int64_t> next(std::size_t(batch * size));
  for (std::int64_t b = 0; b < batch; ++b) advance(b, cache.of(b), next.data() + b * size);
  return next;
}

void publish(const std::vector<std::int64_t>& next, const Staircase& cache) {
  std::copy(next.begin(), next.end(), cache.state);
}

}  // namespace

void staircase_append(const StaircaseAppendParams& params, const Executor& executor) {
  StaircaseAppendParams p = params;
  const StaircaseLayout& layout = p.cache.layout;
  std::int64_t most = 0;
  const auto next = next_states(p.cache, p.batch, [&](std::int64_t b, const StaircaseState& state, std::int64_t* to) {
    const std::int64_t tokens = p.counts ? p.counts[b] : p.tokens;
    most = std::max(most, tokens);
    next_state_of_append(layout, state, tokens, to);
  });
  p.next_state = next.data();
  run(&Kernels::staircase_append_workspace, &Kernels::staircase_append, p, executor, operations(p, most));
  if (p.most_units < 0) publish(next, p.cache);
}

void staircase_crop(const StaircaseCropParams& params, const Executor& executor) {
  StaircaseCropParams p = params;
  const StaircaseLayout& layout = p.cache.layout;
  const auto next = next_states(p.cache, p.batch, [&](std::int64_t b, const StaircaseState& state, std::int64_t* to) {
    next_state_of_crop(layout, state, tokens_to_keep(state, p.lengths[b]), to);
  });
  p.next_state = next.data();
  run(&Kernels::staircase_crop_workspace, &Kernels::staircase_crop, p, executor, operations(p, layout.window));
  publish(next, p.cache);
}

void staircase_read(const StaircaseReadParams& p, const Executor& executor) {
  run(&Kernels::staircase_read_workspace, &Kernels::staircase_read, p, executor, operations(p, p.count));
}

}  // namespace attnx::cpu
