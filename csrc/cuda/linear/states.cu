#include "cuda/linear/kernels.h"
#include "cuda/linear/operands.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256, kParts = kThreads / kLinearRows;

// A block makes up to 128 rows of a state. Its tiles of rows and values are summed up one after another.
template <class Input, int kDim>
__global__ void __launch_bounds__(kThreads, 1) attnx_linear_states(const __grid_constant__ StateArguments args) {
  using Tile = LinearTile<kDim>;
  constexpr int kChunk = kDim < 128 ? kDim : 128, kChunks = kDim / kChunk, kRowWarps = kDim < 128 ? 2 : 4;
  constexpr int kColumnWarps = 8 / kRowWarps;
  using Result = SharedTile<kChunk, kDim>;
  static_assert(Result::kBytes <= 2 * Tile::kBytes);
  extern __shared__ uint4 shared[];
  __shared__ float weights[kLinearRows];  // of the rows in the last column
  const std::uint32_t features = shared_address(shared), values = features + Tile::kBytes;

  const int heads = args.of_queries ? args.heads_of_unit : 1;
  const int blocks = args.of_queries ? args.query_blocks_of_head : args.key_blocks_of_head;
  int index = blockIdx.x;
  const int first_feature = index % kChunks * kChunk;
  index /= kChunks;
  const int state = index;  // among those of the launch
  const int block = index % blocks, head_of_unit = index / blocks % heads;
  const LinearUnit unit(args, index / blocks / heads);
  if (first_feature >= args.state.features) return;

  const int head = unit.key_head * heads + head_of_unit;
  const std::int64_t first_row = args.of_queries ? unit.sequence.first_q : unit.sequence.first_k;
  const int size = args.of_queries ? args.block_q : args.block_k;
  const int length = args.of_queries ? unit.sequence.length_q : unit.sequence.band.length_k;
  const int end = min(block * size + size, length);
  const RowLoader<Input, Tile, kThreads> load{args, unit.batch};
  const LinearRow* const row_terms = args.rows + (std::int64_t(unit.index) * heads + head_of_unit) * args.length_q;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kM = kChunk / kRowWarps, kN = kDim / kColumnWarps;
  const int own_feature = warp % kRowWarps * kM, own_value = warp / kRowWarps * 16;
  Accumulators<kM, kN> sums;
  clear(sums);
  float last = 0;  // of the thread's feature
#pragma unroll 1
  for (int row = block * size; row < end; row += kLinearRows) {
    __syncthreads();
    load(features, args.features, head, first_row, row, end, args.head_dim);
    load(values, args.values, head, first_row, row, end, args.value_dim);
    const int own_row = row + threadIdx.x / kParts;
    LinearRow terms{own_row < end ? 1.0f : 0.0f, -1};
    if (args.of_queries && own_row < end) terms = row_terms[own_row];
    if (threadIdx.x % kParts == 0) weights[threadIdx.x / kParts] = -terms.delta;
    finish_copies();
    map_features<Input, Tile, kThreads>(features, args.feature_map, int(args.head_dim), terms.inverse);
    __syncthreads();
    const int feature = first_feature + threadIdx.x;
    if (threadIdx.x < kChunk) {
      for (int r = 0; r < kLinearRows; ++r) {
        const std::uint32_t word = load_shared_word(features + Tile::offset(r, feature / 8) + feature % 8 / 2 * 4);
        const float2 pair = unpack(word, Input());
        last = fmaf(feature % 2 ? pair.y : pair.x, weights[r], last);
      }
    }
    multiply<Input, kLinearRows>(sums, TransposedA<Tile>(features, lane, first_feature + own_feature),
                                 TransposedB<Tile, kColumnWarps>(values, lane, own_value));
  }

  const float factor = 1 / float(size);
  Input* const to = static_cast<Input*>(args.of_queries ? args.by_query : args.by_key) + state * args.state.size;
  if (threadIdx.x < kChunk && args.state.last + first_feature + threadIdx.x < args.state.size)
    to[args.state.last + first_feature + threadIdx.x] = Input(last * factor);
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kM / 16; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        const int row = own_feature + m * 16 + half * 8 + lane / 4;
        const int chunk = own_value / 8 + n / 2 * 2 * kColumnWarps + n % 2;
        store_shared(features + Result::offset(row, chunk) + lane % 4 * 4,
                     pack(sums[m][n][half * 2] * factor, sums[m][n][half * 2 + 1] * factor, Input()));
      }
  __syncthreads();
  store_tile<true, Result, kChunk, kThreads>(features, 0, StridedRows<Input>{to, args.state.value_lanes}, first_feature,
                                             args.state.features, args.state.value_lanes, threadIdx.x);
}

}  // namespace

void launch_linear_states(const StateArguments& args, DType dtype, cudaStream_t stream) {
  const std::int64_t states =
      args.units * (args.of_queries ? args.heads_of_unit * args.query_blocks_of_head : args.key_blocks_of_head);
  with_linear_kernel(args, dtype, [&]<class Input, int kDim>() {
    launch_kernel("attnx_linear_states", attnx_linear_states<Input, kDim>, states * (kDim == 256 ? 2 : 1), kThreads,
                  2 * LinearTile<kDim>::kBytes, stream, args);
  });
}

}  // namespace attnx::cuda
