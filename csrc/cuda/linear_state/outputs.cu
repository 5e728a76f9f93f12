#include "cuda/common/device.h"
#include "cuda/linear_state/kernels.h"
#include "cuda/linear_state/tokens.h"

namespace attnx::cuda {

namespace {

template <bool kTaylor>
struct OutputsMemory {
  StateRows<kTaylor> queries, keys;
  SharedMatrix values, state, outputs, weights;
  FeaturePair* pairs;
  int feature_lanes, bytes;

  __host__ __device__ OutputsMemory(const LinearStateArguments& a, void* memory)
      : feature_lanes(round_to(a.features, 16)) {
    SharedArena arena(memory);
    const int dim = int(a.p.head_dim), lanes = round_to(a.width + 1, 8), of_pairs = a.p.is_causal ? a.chunk : 0;
    state = arena.take_steps(feature_lanes, lanes);
    values = arena.take_steps(of_pairs, lanes);
    outputs = arena.take_steps(a.chunk, lanes);
    weights = arena.take_rows(of_pairs, a.chunk);
    pairs = arena.take<FeaturePair>(kTaylor ? feature_lanes : 0);
    queries = {arena.take_rows(a.chunk, StateRows<kTaylor>::columns(dim)), pairs, dim};
    keys = {arena.take_rows(of_pairs, StateRows<kTaylor>::columns(dim)), pairs, dim};
    bytes = arena.bytes();
  }
};

// These finish the rows of a chunk from their sums: a warp has a row.
template <class Input>
__device__ __forceinline__ void finish_row(const StateOutputArguments& args, const float* sums, int batch, int head,
                                           std::int64_t row, const StateColumns& columns) {
  const float factor = sums[0] == 0 ? 0 : 1 / sums[0];
  Input* const to = row_of<Input>(args.output, batch, head, row) + columns.first;
  for (int d = threadIdx.x % 32; d < columns.count; d += 32) to[d] = Input(sums[1 + d] * factor);
}
template <class Input>
__device__ __forceinline__ void finish_row(const StateRowArguments& args, const float* sums, int batch, int head,
                                           std::int64_t row, const StateColumns& columns) {
  const float factor = sums[0] == 0 ? 0 : 1 / sums[0];
  const Input* const grad = row_of<const Input>(args.rows.grad_output, batch, head, row) + columns.first;
  float dot = 0;
  for (int d = threadIdx.x % 32; d < columns.count; d += 32) dot = fmaf(float(grad[d]), sums[1 + d] * factor, dot);
  dot = sum_of_warp(dot);
  if (threadIdx.x % 32 != 0) return;
  const std::int64_t all = args.p.batch * args.p.heads_q * args.p.length_q;
  const std::int64_t place = (batch * args.p.heads_q + head) * args.p.length_q + row;
  if (columns.first == 0) args.rows.sums[place] = sums[0];
  args.rows.dots[columns.first / args.width * all + place] = dot;
}

template <class Input, bool kTaylor, class Args>
__global__ void __launch_bounds__(kStateThreads, 2) attnx_linear_state_outputs(const __grid_constant__ Args args) {
  constexpr int kBlocks = 5;
  extern __shared__ uint4 shared[];
  const OutputsMemory<kTaylor> m(args, shared);
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
      __syncthreads();
      if (p.is_causal) {
        multiply_pairs(m.weights, m.queries, m.keys, rows, pair_weight<kTaylor>);
        __syncthreads();
      }
      for_each_split_tile<kBlocks, kStateThreads>(
          rows, lanes, [&](SplitTile<kBlocks>& tile, int row, int column, int blocks) {
            tile.template add_product<false, false>([&](int i, int f) { return m.queries.feature(row + i, f); },
                                                    [&](int f, int c) { return m.state(f, column + c); },
                                                    m.feature_lanes, blocks);
            if (p.is_causal)
              tile.template add_product<false, true>([&](int i, int j) { return m.weights(row + i, j); },
                                                     [&](int j, int c) { return m.values(j, column + c); },
                                                     row + kTileRows, blocks);
            tile.for_each(blocks, [&](int i, int c, float sum) { m.outputs(row + i, column + c) = sum; });
          });
      __syncthreads();
      for (int i = threadIdx.x / 32; i < count; i += kStateWarps)
        finish_row<Input>(args, m.outputs.row(i), unit.batch, head, first + i, columns);
    }
    if (p.is_causal) add_to_state<true>(m.state, m.keys, m.values, m.feature_lanes, lanes, round_to(count, 8));
  }
  if (args.last && unit.segment == args.segments - 1) {
    __syncthreads();
    store_state(args, m.state, args.last + (unit.batch * p.heads_k + unit.head) * args.state_size, columns);
  }
}

template <class Args>
void launch(const Args& args, cudaStream_t stream) {
  with_state_kernel(args.p, [&]<class Input, bool kTaylor>() {
    launch_kernel("attnx_linear_state_outputs", attnx_linear_state_outputs<Input, kTaylor, Args>,
                  args.p.batch * args.p.heads_k * args.segments * args.tiles, kStateThreads, state_output_bytes(args),
                  stream, args);
  });
}

}  // namespace

int state_output_bytes(const LinearStateArguments& args) {
  return args.p.taylor ? OutputsMemory<true>(args, nullptr).bytes : OutputsMemory<false>(args, nullptr).bytes;
}

void launch_state_outputs(const StateOutputArguments& args, cudaStream_t stream) { launch(args, stream); }
void launch_state_rows(const StateRowArguments& args, cudaStream_t stream) { launch(args, stream); }

}  // namespace attnx::cuda
