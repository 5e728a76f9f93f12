#include <type_traits>

#include "cuda/common/device.h"
#include "cuda/linear_state/gradients.h"
#include "cuda/linear_state/kernels.h"
#include "cuda/linear_state/tokens.h"

namespace attnx::cuda {

namespace {

template <bool kTaylor>
struct SumsMemory {
  StateRows<kTaylor> rows;
  SharedMatrix values, state;
  FeaturePair* pairs;
  int feature_lanes, bytes;

  __host__ __device__ SumsMemory(const LinearStateArguments& a, void* memory)
      : feature_lanes(round_to(a.features, 16)) {
    SharedArena arena(memory);
    const int dim = int(a.p.head_dim), lanes = round_to(a.width + 1, 8);
    state = arena.take_steps(feature_lanes, lanes);
    values = arena.take_steps(a.chunk, lanes);
    pairs = arena.take<FeaturePair>(kTaylor ? feature_lanes : 0);
    rows = {arena.take_rows(a.chunk, StateRows<kTaylor>::columns(dim)), pairs, dim};
    bytes = arena.bytes();
  }
};

// These load the tokens of a segment, keys with [1, V] or queries with G.
template <class Input, bool kTaylor>
__device__ __forceinline__ void load_tokens(const LinearStateArguments& args, const SumsMemory<kTaylor>& m, int batch,
                                            int head, std::int64_t first, int count, const StateColumns& columns) {
  load_rows<Input>(args, m.rows, args.p.key, batch, head, first, count, 1);
  load_values<Input>(args, m.values, batch, head, first, count, columns);
}
template <class Input, bool kTaylor>
__device__ __forceinline__ void load_tokens(const StateGradArguments& args, const SumsMemory<kTaylor>& m, int batch,
                                            int head, std::int64_t first, int count, const StateColumns& columns) {
  load_rows<Input>(args, m.rows, args.p.query, batch, head, first, count, args.scale);
  load_gradients<Input>(args, args.rows, m.values, batch, head, first, count, columns);
}

template <class Input, bool kTaylor, class Args>
__global__ void __launch_bounds__(kStateThreads, 2) attnx_linear_state_sums(const __grid_constant__ Args args) {
  constexpr bool kOfKeys = std::is_same_v<Args, LinearStateArguments>;
  extern __shared__ uint4 shared[];
  const SumsMemory<kTaylor> m(args, shared);
  const StateUnit unit(args, blockIdx.x);
  const StateColumns columns(args, unit.tile);
  if constexpr (kTaylor) list_pairs(m.pairs, int(args.p.head_dim), m.feature_lanes);
  load_state(args, m.state, nullptr, 0, columns);
  const std::int64_t begin = unit.segment * args.of_segment,
                     end = min(begin + args.of_segment, kOfKeys ? args.p.length_k : args.p.length_q);
  const int heads = kOfKeys ? 1 : int(args.p.heads_q / args.p.heads_k);
#pragma unroll 1
  for (std::int64_t first = begin; first < end; first += args.chunk) {
    const int count = int(min(std::int64_t(args.chunk), end - first));
#pragma unroll 1
    for (int head = unit.head * heads; head < (unit.head + 1) * heads; ++head) {
      __syncthreads();
      load_tokens<Input>(args, m, unit.batch, head, first, count, columns);
      __syncthreads();
      add_to_state<kOfKeys>(m.state, m.rows, m.values, m.feature_lanes, columns.lanes, round_to(count, 8));
    }
  }
  __syncthreads();
  store_state(args, m.state, unit.state(args), columns);
}

template <class Args>
void launch(const Args& args, cudaStream_t stream) {
  with_state_kernel(args.p, [&]<class Input, bool kTaylor>() {
    launch_kernel("attnx_linear_state_sums", attnx_linear_state_sums<Input, kTaylor, Args>,
                  args.p.batch * args.p.heads_k * args.segments * args.tiles, kStateThreads, state_sums_bytes(args),
                  stream, args);
  });
}

}  // namespace

int state_sums_bytes(const LinearStateArguments& args) {
  return args.p.taylor ? SumsMemory<true>(args, nullptr).bytes : SumsMemory<false>(args, nullptr).bytes;
}

void launch_state_sums(const LinearStateArguments& args, cudaStream_t stream) { launch(args, stream); }
void launch_state_grad_sums(const StateGradArguments& args, cudaStream_t stream) { launch(args, stream); }

}  // namespace attnx::cuda
