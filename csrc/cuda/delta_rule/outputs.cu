#include <type_traits>

#include "cuda/common/device.h"
#include "cuda/delta_rule/chunk.h"
#include "cuda/delta_rule/gradients.h"

namespace attnx::cuda {

namespace {

template <class Input>
struct OutputsMemory {
  InputRows<Input> keys, queries, values;  // outputs take the place of values
  SharedMatrix state, differences, coupling, pairs;
  DeltaGates* gates;
  int key_lanes, bytes;

  __host__ __device__ OutputsMemory(const DeltaRuleArguments& a, void* memory)
      : key_lanes(round_to(int(a.p.key_dim), 16)) {
    SharedArena arena(memory);
    keys = InputRows<Input>::take(arena, a.chunk, key_lanes);
    queries = InputRows<Input>::take(arena, a.chunk, key_lanes);
    values = InputRows<Input>::take(arena, a.chunk, a.width);
    state = arena.take_steps(key_lanes, a.width);
    differences = arena.take_steps(a.chunk, a.width);
    coupling = arena.take_rows(a.chunk, a.chunk);
    pairs = arena.take_rows(a.chunk, a.chunk);
    gates = arena.take<DeltaGates>(1);
    bytes = arena.bytes();
  }
};

// A block goes forward through the chunks. For the backward it leaves states and differences in the place of outputs.
template <class Input, class Args>
__global__ void __launch_bounds__(kDeltaThreads, 2) attnx_delta_rule_outputs(const __grid_constant__ Args args) {
  constexpr bool kWithOutputs = std::is_same_v<Args, DeltaOutputArguments>;
  constexpr int kBlocks = 4;
  extern __shared__ uint4 shared[];
  const OutputsMemory<Input> m(args, shared);
  const DeltaRuleParams& p = args.p;
  const DeltaUnit unit(args, blockIdx.x);
  const int key_dim = int(p.key_dim), value_dim = int(p.value_dim);
  const float scale = float(p.scale);
  const float* const initial =
      p.initial_state.data ? row_of<const float>(p.initial_state, unit.batch, unit.head, 0) : nullptr;
  load_state(m.state, initial, p.initial_state.row_stride, key_dim, unit);

#pragma unroll 1
  for (std::int64_t first = 0; first < p.length; first += args.chunk) {
    const int count = int(min(std::int64_t(args.chunk), p.length - first)), rows = round_to(count, kTileRows);
    __syncthreads();
    load_rows(m.keys, p.key, unit.batch, unit.key_head, first, count, rows, 0, key_dim, m.key_lanes);
    if constexpr (kWithOutputs)
      load_rows(m.queries, p.query, unit.batch, unit.key_head, first, count, rows, 0, key_dim, m.key_lanes);
    load_rows(m.values, p.value, unit.batch, unit.head, first, count, rows, unit.first, unit.count, unit.lanes);
    m.gates->read(args, unit.batch, unit.head, first, count);
    finish_rows();
    const DeltaGates& gates = *m.gates;
    multiply_pairs(m.coupling, m.keys, m.keys, rows, m.key_lanes,
                   [&](int i, int j, float product) { return gates.decay(i, j) * gates.beta[j] * product; });
    if constexpr (kWithOutputs)
      multiply_pairs(m.pairs, m.queries, m.keys, rows, m.key_lanes,
                     [&](int i, int j, float product) { return scale * gates.decay(i, j) * product; });
    for_each_split_tile<kBlocks, kDeltaThreads>(
        rows, unit.lanes, [&](SplitTile<kBlocks>& tile, int row, int column, int blocks) {
          tile.template add_product<true, false>([&](int i, int k) { return m.keys(row + i, k); },
                                                 [&](int k, int d) { return m.state(k, column + d); }, m.key_lanes,
                                                 blocks);
          tile.for_each(blocks, [&](int i, int d, float held) {
            const int token = row + i, c = column + d;
            m.differences(token, c) = m.values(token, c) - gates.from_start[token] * held;
          });
        });
    __syncthreads();
    solve_unit_lower(m.differences, [&](int i, int j) { return m.coupling(i, j); }, rows, unit.lanes);
    if constexpr (!kWithOutputs) {
      const std::int64_t chunk = unit.of_launch * args.chunks + first / args.chunk;
      store_columns(m.state, args.states + chunk * key_dim * value_dim, key_dim, value_dim, unit);
      float* const to = args.differences + (unit.of_launch * p.length + first) * value_dim;
      store_columns(m.differences, to, count, value_dim, unit);
      __syncthreads();
    }
    for (int i = threadIdx.x / 32; i < rows; i += kDeltaWarps)
      for (int d = threadIdx.x % 32; d < unit.lanes; d += 32) m.differences(i, d) *= gates.beta[i];
    __syncthreads();
    if constexpr (kWithOutputs) {
      for_each_split_tile<kBlocks, kDeltaThreads>(
          rows, unit.lanes, [&](SplitTile<kBlocks>& tile, int row, int column, int blocks) {
            tile.template add_product<true, false>([&](int i, int k) { return m.queries(row + i, k); },
                                                   [&](int k, int d) { return m.state(k, column + d); }, m.key_lanes,
                                                   blocks);
            tile.for_each(blocks, [&](int i, int, float& sum) { sum *= scale * gates.from_start[row + i]; });
            tile.template add_product<false, false>([&](int i, int j) { return m.pairs(row + i, j); },
                                                    [&](int j, int d) { return m.differences(j, column + d); },
                                                    row + kTileRows, blocks);
            tile.for_each(blocks, [&](int i, int d, float sum) {
              m.values.data[(row + i) * m.values.pitch + column + d] = Input(sum);
            });
          });
      __syncthreads();
      for (int i = threadIdx.x / 32; i < count; i += kDeltaWarps) {
        Input* const to = row_of<Input>(args.output, unit.batch, unit.head, first + i) + unit.first;
        for (int d = threadIdx.x % 32; d < unit.count; d += 32) to[d] = m.values.data[i * m.values.pitch + d];
      }
    }
    advance(m.state, m.keys, m.differences, gates, m.key_lanes, unit.lanes, round_to(count, 8));
  }
  if constexpr (kWithOutputs) {
    __syncthreads();
    store_columns(m.state, args.state + (unit.batch * p.heads_v + unit.head) * key_dim * value_dim, key_dim, value_dim,
                  unit);
  }
}

template <class Args>
void launch(const Args& args, cudaStream_t stream) {
  with_delta_dtype(args.p.dtype, [&]<class Input>() {
    launch_kernel("attnx_delta_rule_outputs", attnx_delta_rule_outputs<Input, Args>, args.heads * args.tiles,
                  kDeltaThreads, delta_output_bytes(args), stream, args);
  });
}

}  // namespace

int delta_output_bytes(const DeltaRuleArguments& args) { return OutputsMemory<__half>(args, nullptr).bytes; }

void launch_delta_outputs(const DeltaOutputArguments& args, cudaStream_t stream) { launch(args, stream); }
void launch_delta_states(const DeltaGradArguments& args, cudaStream_t stream) { launch(args, stream); }

}  // namespace attnx::cuda
