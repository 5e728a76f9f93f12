#include "cuda/common/device.h"
#include "cuda/delta_rule/chunk.h"
#include "cuda/delta_rule/gradients.h"

namespace attnx::cuda {

namespace {

template <class Input>
struct GradValuesMemory {
  InputRows<Input> keys, queries, grad_outputs;
  SharedMatrix grad_state, z, coupling, pairs;
  DeltaGates* gates;
  int key_lanes, bytes;

  __host__ __device__ GradValuesMemory(const DeltaRuleArguments& a, void* memory)
      : key_lanes(round_to(int(a.p.key_dim), 16)) {
    SharedArena arena(memory);
    keys = InputRows<Input>::take(arena, a.chunk, key_lanes);
    queries = InputRows<Input>::take(arena, a.chunk, key_lanes);
    grad_outputs = InputRows<Input>::take(arena, a.chunk, a.width);
    grad_state = arena.take_steps(key_lanes, a.width);
    z = arena.take_steps(a.chunk, a.width);
    coupling = arena.take_rows(a.chunk, a.chunk);
    pairs = arena.take_rows(a.chunk, a.chunk);
    gates = arena.take<DeltaGates>(1);
    bytes = arena.bytes();
  }
};

// A block takes some columns of the gradient of a head's state back through all chunks.
template <class Input>
__global__ void __launch_bounds__(kDeltaThreads, 2)
    attnx_delta_rule_grad_values(const __grid_constant__ DeltaGradArguments args) {
  constexpr int kBlocks = 4;
  extern __shared__ uint4 shared[];
  const GradValuesMemory<Input> m(args, shared);
  const DeltaRuleParams& p = args.p;
  const DeltaUnit unit(args, blockIdx.x);
  const int key_dim = int(p.key_dim), value_dim = int(p.value_dim);
  const float scale = float(p.scale);
  const float* const last =
      args.grad_state.data ? row_of<const float>(args.grad_state, unit.batch, unit.head, 0) : nullptr;
  load_state(m.grad_state, last, args.grad_state.row_stride, key_dim, unit);

#pragma unroll 1
  for (int chunk = args.chunks - 1; chunk >= 0; --chunk) {
    const std::int64_t first = std::int64_t(chunk) * args.chunk;
    const int count = int(min(std::int64_t(args.chunk), p.length - first)), rows = round_to(count, kTileRows);
    __syncthreads();
    load_rows(m.keys, p.key, unit.batch, unit.key_head, first, count, rows, 0, key_dim, m.key_lanes);
    load_rows(m.queries, p.query, unit.batch, unit.key_head, first, count, rows, 0, key_dim, m.key_lanes);
    load_rows(m.grad_outputs, args.grad_output, unit.batch, unit.head, first, args.grad_output.data ? count : 0, rows,
              unit.first, unit.count, unit.lanes);
    m.gates->read(args, unit.batch, unit.head, first, count);
    store_columns(m.grad_state, args.grad_states + (unit.of_launch * args.chunks + chunk) * key_dim * value_dim,
                  key_dim, value_dim, unit);
    finish_rows();
    const DeltaGates& gates = *m.gates;
    multiply_pairs(m.coupling, m.keys, m.keys, rows, m.key_lanes,
                   [&](int i, int j, float product) { return gates.decay(i, j) * gates.beta[i] * product; });
    multiply_pairs(m.pairs, m.queries, m.keys, rows, m.key_lanes,
                   [&](int i, int j, float product) { return scale * gates.decay(i, j) * product; });
    __syncthreads();
    for_each_split_tile<kBlocks, kDeltaThreads>(
        rows, unit.lanes, [&](SplitTile<kBlocks>& tile, int row, int column, int blocks) {
          tile.template add_product<true, false>([&](int i, int k) { return m.keys(row + i, k); },
                                                 [&](int k, int d) { return m.grad_state(k, column + d); }, m.key_lanes,
                                                 blocks);
          tile.for_each(blocks, [&](int i, int, float& sum) { sum *= gates.to_end[row + i]; });
          // Queries from the tile's first key on see it.
          tile.template add_product<false, true>([&](int i, int j) { return m.pairs(row + j, row + i); },
                                                 [&](int j, int d) { return m.grad_outputs(row + j, column + d); },
                                                 rows - row, blocks);
          tile.for_each(blocks, [&](int i, int d, float sum) { m.z(row + i, column + d) = row + i < count ? sum : 0; });
        });
    __syncthreads();
    // Read from the last token to the first the system is a lower one.
    solve_unit_lower(
        SharedMatrix{m.z.row(rows - 1), -m.z.pitch},
        [&](int i, int j) { return m.coupling(rows - 1 - j, rows - 1 - i); }, rows, unit.lanes);
    store_columns(m.z, args.z + (unit.of_launch * p.length + first) * value_dim, count, value_dim, unit);
    __syncthreads();
    for (int i = threadIdx.x / 32; i < rows; i += kDeltaWarps)
      for (int d = threadIdx.x % 32; d < unit.lanes; d += 32) {
        const float grad = m.z(i, d) *= gates.beta[i];
        if (i < count && d < unit.count)
          row_of<Input>(args.grad_value, unit.batch, unit.head, first + i)[unit.first + d] = Input(grad);
      }
    __syncthreads();
    const float whole = gates.whole();
    for_each_split_tile<kBlocks, kDeltaThreads>(
        m.key_lanes, unit.lanes, [&](SplitTile<kBlocks>& tile, int key, int column, int blocks) {
          const int tokens = round_to(count, 8);
          tile.template add_product<true, false>(
              [&](int k, int i) { return m.queries(i, key + k); },
              [&](int i, int d) { return scale * gates.from_start[i] * m.grad_outputs(i, column + d); }, tokens,
              blocks);
          tile.template add_product<true, false>(
              [&](int k, int i) { return m.keys(i, key + k); },
              [&](int i, int d) { return -gates.from_start[i] * m.z(i, column + d); }, tokens, blocks);
          tile.for_each(blocks, [&](int k, int d, float sum) {
            float& own = m.grad_state(key + k, column + d);
            own = fmaf(whole, own, sum);
          });
        });
  }
  __syncthreads();
  store_columns(m.grad_state, args.grad_initial_state + (args.first_head + unit.of_launch) * key_dim * value_dim,
                key_dim, value_dim, unit);
}

}  // namespace

int delta_grad_values_bytes(const DeltaRuleArguments& args) { return GradValuesMemory<__half>(args, nullptr).bytes; }

void launch_delta_grad_values(const DeltaGradArguments& args, cudaStream_t stream) {
  with_delta_dtype(args.p.dtype, [&]<class Input>() {
    launch_kernel("attnx_delta_rule_grad_values", attnx_delta_rule_grad_values<Input>, args.heads * args.tiles,
                  kDeltaThreads, delta_grad_values_bytes(args), stream, args);
  });
}

}  // namespace attnx::cuda
