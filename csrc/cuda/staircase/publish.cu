#include "publish.h"

#include "cuda/common/device.h"
#include "cuda/staircase/next_state.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128;

template <class Params>
__global__ void __launch_bounds__(kThreads) attnx_staircase_publish(const __grid_constant__ Params p) {
  const std::int64_t batch = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (batch >= p.batch) return;
  const NextState next = next_state(p, batch);
  std::int64_t* const state = p.cache.state + batch * p.cache.layout.state_size();
  for (int i = 0; i < p.cache.layout.state_size(); ++i) state[i] = next.row[i];
}

template <class Params>
void launch(const Params& p, const Launch& where) {
  launch_kernel("attnx_staircase_publish", attnx_staircase_publish<Params>, (p.batch + kThreads - 1) / kThreads,
                kThreads, 0, static_cast<cudaStream_t>(where.stream), p);
}

}  // namespace

void publish(const StaircaseAppendParams& params, const Launch& where) { launch(params, where); }
void publish(const StaircaseCropParams& params, const Launch& where) { launch(params, where); }

}  // namespace attnx::cuda
