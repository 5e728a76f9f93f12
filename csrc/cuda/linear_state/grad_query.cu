#include "cuda/common/device.h"
#include "cuda/linear_state/gradients.h"

namespace attnx::cuda {

namespace {

template <bool kTaylor>
struct GradQueryMemory {
  StateRows<kTaylor> queries, keys;
  SharedMatrix values, state, gradients, pairs_or_slab, grad_rows;
  FeaturePair* pairs;
  int feature_lanes, bytes;

  __host__ __device__ GradQueryMemory(const LinearStateArguments& a, void* memory)
      : feature_lanes(round_to(a.features, 16)) {
    SharedArena arena(memory);
    const int dim = int(a.p.head_dim), lanes = round_to(a.width + 1, 8), of_pairs = a.p.is_causal ? a.chunk : 0;
    state = arena.take_steps(feature_lanes, lanes);
    values = arena.take_rows(of_pairs, lanes);
    gradients = arena.take_rows(a.chunk, lanes);
    pairs_or_slab = arena.take_rows(a.chunk, kFeatureSlab);
    grad_rows = arena.take_rows(a.chunk, round_to(dim, 16));
    pairs = arena.take<FeaturePair>(kTaylor ? feature_lanes : 0);
    queries = {arena.take_rows(a.chunk, StateRows<kTaylor>::columns(dim)), pairs, dim};
    keys = {arena.take_rows(of_pairs, StateRows<kTaylor>::columns(dim)), pairs, dim};
    bytes = arena.bytes();
  }
};

// A block goes forward through the chunks of a segment, as that of the outputs does.
template <class Input, bool kTaylor>
__global__ void __launch_bounds__(kStateThreads, 2)
    attnx_linear_state_grad_query(const __grid_constant__ StateGradArguments args) {
  extern __shared__ uint4 shared[];
  const GradQueryMemory<kTaylor> m(args, shared);
  const LinearStateParams& p = args.p;
  const StateUnit unit(args, blockIdx.x);
  const StateColumns columns(args, unit.tile);
  const int lanes = columns.lanes, group = int(p.heads_q / p.heads_k);
  if constexpr (kTaylor) list_pairs(m.pairs, int(p.head_dim), m.feature_lanes);
  load_start(args, m.state, args.whole, unit, columns, false);

  const std::int64_t begin = unit.segment * args.of_segment, end = min(begin + args.of_segment, p.length_q);
#pragma unroll 1
  for (std::int64_t first = begin; first < end; first += args.chunk) {
    const int count = int(min(std::int64_t(args.chunk), end - first)), rows = round_to(count, kTileRows);
    if (p.is_causal) {
      __syncthreads();
      load_rows<Input>(args, m.keys, p.key, unit.batch, unit.head, first, count, 1);
      load_values<Input>(args, m.values, unit.batch, unit.head, first, count, columns);
    }
#pragma unroll 1
    for (int head = unit.head * group; head < (unit.head + 1) * group; ++head) {
      __syncthreads();
      load_rows<Input>(args, m.queries, p.query, unit.batch, head, first, count, args.scale);
      load_gradients<Input>(args, args.rows, m.gradients, unit.batch, head, first, count, columns);
      __syncthreads();
      differentiate_rows<false>(m.grad_rows, m.queries, m.gradients, m.state, m.pairs_or_slab, m.feature_lanes, lanes,
                                rows);
      if (p.is_causal) {
        differentiate_pairs<kTaylor, false>(m.pairs_or_slab, {}, m.queries, m.keys, m.gradients, m.values, lanes, rows);
        __syncthreads();
        add_product<kTaylor>(
            m.grad_rows, [&](int i, int j) { return m.pairs_or_slab(i, j); },
            [&](int j, int d) { return m.keys.x(j, d); }, rows, m.keys.one(), rows);
        __syncthreads();
      }
      store_part(args, m.grad_rows, unit.tile, p.batch * p.heads_q, unit.batch * p.heads_q + head, p.length_q, first,
                 count);
    }
    if (p.is_causal) add_to_state<true>(m.state, m.keys, m.values, m.feature_lanes, lanes, round_to(count, 8));
  }
}

}  // namespace

int state_grad_query_bytes(const LinearStateArguments& args) {
  return args.p.taylor ? GradQueryMemory<true>(args, nullptr).bytes : GradQueryMemory<false>(args, nullptr).bytes;
}

void launch_state_grad_query(const StateGradArguments& args, cudaStream_t stream) {
  with_state_kernel(args.p, [&]<class Input, bool kTaylor>() {
    launch_kernel("attnx_linear_state_grad_query", attnx_linear_state_grad_query<Input, kTaylor>,
                  args.p.batch * args.p.heads_k * args.segments * args.tiles, kStateThreads,
                  state_grad_query_bytes(args), stream, args);
  });
}

}  // namespace attnx::cuda
