// This makes dQ from its sums, which attnx_backward_sm80 leaves in the order of its threads' registers.
#pragma once

#include "cuda/mainloop/backward_rows.h"
#include "cuda/mainloop/grad_query_place.h"

namespace attnx::cuda {

// A block makes a tile of rows of dQ from its sums.
template <class Storage, class Tile, class Args = GradQueryArguments, class Place = GradQueryPlace<Tile>>
__global__ void __launch_bounds__(Tile::kThreads) attnx_grad_query_sm80(const __grid_constant__ Args args) {
  using Input = typename Storage::Input;
  using RowTile = SharedTile<Tile::kM, Tile::kHeadDim>;
  constexpr int kQueryRows = Tile::kM / Tile::kRowWarps, kQueryFeatures = Tile::kHeadDim / Tile::kRowWarpsD;
  extern __shared__ uint4 shared[];
  const std::uint32_t shared_rows = shared_address(shared);

  const Place place = Place::of(args, blockIdx.x);
  const auto& [head, batch, sequence, row_begin, row_end, row_tile] = place;
  if (row_begin >= row_end) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* from = args.sums + row_tile * (Tile::kM * Tile::kHeadDim) + threadIdx.x;
  Accumulators<kQueryRows, kQueryFeatures> grad_query;
#pragma unroll
  for (int m = 0; m < kQueryRows / 16; ++m)
#pragma unroll
    for (int n = 0; n < kQueryFeatures / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) grad_query[m][n][e] = from[((m * (kQueryFeatures / 8) + n) * 4 + e) * Tile::kThreads];
  const int row = warp % Tile::kRowWarps * kQueryRows, feature = warp / Tile::kRowWarps * 16;
  float factor = args.scale;
  if (args.addend.data) {
    const auto addend =
        Storage::template query_rows<const float>(args, args.addend, batch, query_head_of(args, head), sequence);
    add_rows<false, Tile::kRowWarpsD>(grad_query, factor, addend, row_begin + row, row_end, feature, int(args.head_dim),
                                      lane);
    factor = 1;
  }
  store_accumulators<RowTile, Input, Tile::kRowWarpsD>(shared_rows, row, feature, lane, grad_query, factor);
  __syncthreads();
  const auto rows =
      Storage::template query_rows<Input>(args, args.grad_query, batch, query_head_of(args, head), sequence);
  Storage::template store<RowTile, Tile::kM, Tile::kThreads>(shared_rows, 0, rows, row_begin, row_end,
                                                             int(args.head_dim), threadIdx.x);
}

}  // namespace attnx::cuda
