#include "cuda/common/device.h"
#include "cuda/linear_state/kernels.h"
#include "cuda/linear_state/tokens.h"

namespace attnx::cuda {

namespace {

template <bool kTaylor>
struct SumsMemory {
  StateRows<kTaylor> keys;
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
    keys = {arena.take_rows(a.chunk, StateRows<kTaylor>::columns(dim)), pairs, dim};
    bytes = arena.bytes();
  }
};

template <class Input, bool kTaylor>
__global__ void __launch_bounds__(kStateThreads)
    attnx_linear_state_sums(const __grid_constant__ LinearStateArguments args) {
  extern __shared__ uint4 shared[];
  const SumsMemory<kTaylor> m(args, shared);
  const StateUnit unit(args, blockIdx.x);
  const StateColumns columns(args, unit.tile);
  if constexpr (kTaylor) list_pairs(m.pairs, int(args.p.head_dim), m.feature_lanes);
  load_state(args, m.state, nullptr, 0, columns);
  const std::int64_t begin = unit.segment * args.of_segment, end = min(begin + args.of_segment, args.p.length_k);
#pragma unroll 1
  for (std::int64_t first = begin; first < end; first += args.chunk) {
    const int count = int(min(std::int64_t(args.chunk), end - first));
    __syncthreads();
    load_rows<Input>(args, m.keys, args.p.key, unit.batch, unit.head, first, count, 1);
    load_values<Input>(args, m.values, unit.batch, unit.head, first, count, columns);
    __syncthreads();
    add_to_state<true>(m.state, m.keys, m.values, m.feature_lanes, columns.lanes, round_to(count, 8));
  }
  __syncthreads();
  store_state(args, m.state, unit.state(args), columns);
}

}  // namespace

int state_sums_bytes(const LinearStateArguments& args) {
  return args.p.taylor ? SumsMemory<true>(args, nullptr).bytes : SumsMemory<false>(args, nullptr).bytes;
}

void launch_state_sums(const LinearStateArguments& args, cudaStream_t stream) {
  with_state_kernel(args.p, [&]<class Input, bool kTaylor>() {
    launch_kernel("attnx_linear_state_sums", attnx_linear_state_sums<Input, kTaylor>,
                  args.p.batch * args.p.heads_k * args.segments * args.tiles, kStateThreads, state_sums_bytes(args),
                  stream, args);
  });
}

}  // namespace attnx::cuda
