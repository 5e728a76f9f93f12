#include "cuda/common/device.h"
#include "cuda/delta_rule/chunk.h"
#include "cuda/delta_rule/kernels.h"

namespace attnx::cuda {

namespace {

constexpr int kColumns = 32, kParts = kDeltaThreads / kColumns;  // warps share the rows of a state
constexpr int kMostRows = kMaxHeadDim / kParts;

// A block takes 32 columns of a head's state through the tokens: a lane has a column, and its warp some of the rows,
// which stay in registers. The state is read once and written once.
template <class Input>
__global__ void __launch_bounds__(kDeltaThreads)
    attnx_delta_rule_steps(const __grid_constant__ DeltaRuleForwardParams p, int tiles) {
  __shared__ float keys[kMaxHeadDim], queries[kMaxHeadDim];
  __shared__ float of_key[kParts][kColumns], of_query[kParts][kColumns], of_pair[kParts];
  const int unit = blockIdx.x / tiles, head = unit % int(p.heads_v), batch = unit / int(p.heads_v);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x % tiles * kColumns + lane;
  const int key_dim = int(p.key_dim), key_head = head / int(p.heads_v / p.heads_k);
  const bool inside = column < p.value_dim;
  const float* const initial =
      p.initial_state.data && inside ? row_of<const float>(p.initial_state, batch, head, 0) + column : nullptr;
  float state[kMostRows];
#pragma unroll
  for (int i = 0; i < kMostRows; ++i) {
    const int k = warp + i * kParts;
    state[i] = initial && k < key_dim ? initial[k * p.initial_state.row_stride] : 0;
  }

#pragma unroll 1
  for (int token = 0; token < p.length; ++token) {
    const auto number = [&](const PerToken& x) {
      return static_cast<const float*>(x.data)[batch * x.batch_stride + head * x.head_stride + token * x.row_stride];
    };
    __syncthreads();
    for (int k = threadIdx.x; k < kMaxHeadDim; k += kDeltaThreads) {
      keys[k] = k < key_dim ? float(row_of<const Input>(p.key, batch, key_head, token)[k]) : 0;
      queries[k] = k < key_dim ? float(row_of<const Input>(p.query, batch, key_head, token)[k]) : 0;
    }
    __syncthreads();
    const float decay = expf(number(p.log_decay)), beta = number(p.beta);
    float held = 0, sum = 0, pair = 0;
#pragma unroll
    for (int i = 0; i < kMostRows; ++i) {
      const int k = warp + i * kParts;
      held = fmaf(state[i], keys[k], held);
      sum = fmaf(state[i], queries[k], sum);
      pair = fmaf(keys[k], queries[k], pair);
    }
    of_key[warp][lane] = held;
    of_query[warp][lane] = sum;
    if (lane == 0) of_pair[warp] = pair;
    __syncthreads();
    held = sum = pair = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      held += of_key[part][lane];
      sum += of_query[part][lane];
      pair += of_pair[part];
    }
    const float value = inside ? float(row_of<const Input>(p.value, batch, head, token)[column]) : 0;
    const float correction = beta * (value - decay * held);
    if (warp == 0 && inside)
      row_of<Input>(p.output, batch, head, token)[column] = Input(float(p.scale) * fmaf(decay, sum, pair * correction));
#pragma unroll
    for (int i = 0; i < kMostRows; ++i) state[i] = fmaf(keys[warp + i * kParts], correction, decay * state[i]);
  }

  float* const to = static_cast<float*>(p.state) + std::int64_t(unit) * key_dim * p.value_dim + column;
#pragma unroll
  for (int i = 0; i < kMostRows; ++i) {
    const int k = warp + i * kParts;
    if (inside && k < key_dim) to[k * p.value_dim] = state[i];
  }
}

}  // namespace

void launch_delta_steps(const DeltaRuleForwardParams& p, cudaStream_t stream) {
  const int tiles = int((p.value_dim + kColumns - 1) / kColumns);
  with_delta_dtype(p.dtype, [&]<class Input>() {
    launch_kernel("attnx_delta_rule_steps", attnx_delta_rule_steps<Input>, p.batch * p.heads_v * tiles, kDeltaThreads,
                  0, stream, p, tiles);
  });
}

}  // namespace attnx::cuda
