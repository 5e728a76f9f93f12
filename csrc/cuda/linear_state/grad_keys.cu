#include "cuda/common/device.h"
#include "cuda/linear_state/gradients.h"

namespace attnx::cuda {

namespace {

template <bool kTaylor>
struct GradKeysMemory {
  StateRows<kTaylor> queries, keys;
  SharedMatrix values, state, gradients, pairs_or_slab, weights, grad_rows, grad_values;
  FeaturePair* pairs;
  int feature_lanes, bytes;

  __host__ __device__ GradKeysMemory(const LinearStateArguments& a, void* memory)
      : feature_lanes(round_to(a.features, 16)) {
    SharedArena arena(memory);
    const int dim = int(a.p.head_dim), lanes = round_to(a.width + 1, 8), of_pairs = a.p.is_causal ? a.chunk : 0;
    state = arena.take_steps(feature_lanes, lanes);
    values = arena.take_rows(a.chunk, lanes);
    gradients = arena.take_rows(of_pairs, lanes);
    pairs_or_slab = arena.take_rows(a.chunk, kFeatureSlab);
    weights = arena.take_rows(of_pairs, a.chunk);
    grad_rows = arena.take_rows(a.chunk, round_to(dim, 16));
    grad_values = arena.take_rows(a.chunk, lanes);
    pairs = arena.take<FeaturePair>(kTaylor ? feature_lanes : 0);
    queries = {arena.take_rows(of_pairs, StateRows<kTaylor>::columns(dim)), pairs, dim};
    keys = {arena.take_rows(a.chunk, StateRows<kTaylor>::columns(dim)), pairs, dim};
    bytes = arena.bytes();
  }
};

// A block goes back through the chunks of a segment.
template <class Input, bool kTaylor>
__global__ void __launch_bounds__(kStateThreads, 2)
    attnx_linear_state_grad_keys(const __grid_constant__ StateGradArguments args) {
  extern __shared__ uint4 shared[];
  const GradKeysMemory<kTaylor> m(args, shared);
  const LinearStateParams& p = args.p;
  const StateUnit unit(args, blockIdx.x);
  const StateColumns columns(args, unit.tile);
  const int lanes = columns.lanes, group = int(p.heads_q / p.heads_k);
  if constexpr (kTaylor) list_pairs(m.pairs, int(p.head_dim), m.feature_lanes);
  load_start(args, m.state, args.whole, unit, columns, true);

  const std::int64_t begin = unit.segment * args.of_segment, end = min(begin + args.of_segment, p.length_k);
  const int chunks = end > begin ? int((end - begin + args.chunk - 1) / args.chunk) : 0;
#pragma unroll 1
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const std::int64_t first = begin + std::int64_t(chunk) * args.chunk;
    const int count = int(min(std::int64_t(args.chunk), end - first)), rows = round_to(count, kTileRows);
    __syncthreads();
    load_rows<Input>(args, m.keys, p.key, unit.batch, unit.head, first, count, 1);
    load_values<Input>(args, m.values, unit.batch, unit.head, first, count, columns);
    for (int i = threadIdx.x / 32; i < rows; i += kStateWarps)
      for (int c = threadIdx.x % 32; c < lanes; c += 32) m.grad_values(i, c) = 0;
    __syncthreads();
    differentiate_rows<true>(m.grad_rows, m.keys, m.values, m.state, m.pairs_or_slab, m.feature_lanes, lanes, rows);
    add_product<false>(
        m.grad_values, [&](int j, int f) { return m.keys.feature(j, f); }, [&](int f, int c) { return m.state(f, c); },
        rows, lanes, m.feature_lanes);
#pragma unroll 1
    for (int head = unit.head * group; p.is_causal && head < (unit.head + 1) * group; ++head) {
      __syncthreads();
      load_rows<Input>(args, m.queries, p.query, unit.batch, head, first, count, args.scale);
      load_gradients<Input>(args, args.rows, m.gradients, unit.batch, head, first, count, columns);
      __syncthreads();
      differentiate_pairs<kTaylor, true>(m.pairs_or_slab, m.weights, m.queries, m.keys, m.gradients, m.values, lanes,
                                         rows);
      __syncthreads();
      add_product<false>(
          m.grad_rows, [&](int j, int i) { return m.pairs_or_slab(i, j); },
          [&](int i, int d) { return m.queries.x(i, d); }, rows, m.keys.one(), rows);
      add_product<false>(
          m.grad_values, [&](int j, int i) { return m.weights(i, j); }, [&](int i, int c) { return m.gradients(i, c); },
          rows, lanes, rows);
      add_to_state<false>(m.state, m.queries, m.gradients, m.feature_lanes, lanes, round_to(count, 8));
    }
    __syncthreads();
    store_part(args, m.grad_rows, unit.tile, p.batch * p.heads_k, unit.batch * p.heads_k + unit.head, p.length_k, first,
               count);
    for (int i = threadIdx.x / 32; i < count; i += kStateWarps) {
      Input* const to = row_of<Input>(args.grad_value, unit.batch, unit.head, first + i) + columns.first;
      for (int d = threadIdx.x % 32; d < columns.count; d += 32) to[d] = Input(m.grad_values(i, 1 + d));
    }
  }
  if (args.last && unit.segment == 0) {
    __syncthreads();
    store_state(args, m.state, args.last + (unit.batch * p.heads_k + unit.head) * args.state_size, columns);
  }
}

}  // namespace

int state_grad_keys_bytes(const LinearStateArguments& args) {
  return args.p.taylor ? GradKeysMemory<true>(args, nullptr).bytes : GradKeysMemory<false>(args, nullptr).bytes;
}

void launch_state_grad_keys(const StateGradArguments& args, cudaStream_t stream) {
  with_state_kernel(args.p, [&]<class Input, bool kTaylor>() {
    launch_kernel("attnx_linear_state_grad_keys", attnx_linear_state_grad_keys<Input, kTaylor>,
                  args.p.batch * args.p.heads_k * args.segments * args.tiles, kStateThreads,
                  state_grad_keys_bytes(args), stream, args);
  });
}

}  // namespace attnx::cuda
