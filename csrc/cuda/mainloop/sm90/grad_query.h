// This makes dQ from its sums, which attnx_backward_sm90 leaves in the order of its threads' registers.
#pragma once

#include "cuda/mainloop/backward_rows.h"
#include "cuda/mainloop/grad_query_place.h"
#include "cuda/mainloop/sm90/backward_ptx.h"

namespace attnx::cuda {

// This does what store_accumulators() does, but transposed: a warp's accumulators, rounded, become columns of a tile.
template <class Tile, class Input, int kN>
__device__ __forceinline__ void store_transposed(std::uint32_t tile, int row, int column, int lane,
                                                 const float (&x)[1][kN][4], float factor) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    std::uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pairs)[4] = x[0][n + i / 2];
      packed[i] = pack(pairs[i % 2 * 2] * factor, pairs[i % 2 * 2 + 1] * factor, Input());
    }
    store_matrices_transposed(tile + Tile::offset(row + n * 8 + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2),
                              packed);
  }
}

// A block makes a tile of rows of dQ from its sums.
template <class Storage, class Tile, class Args = GradQueryArguments, class Place = GradQueryPlace<Tile>>
__global__ void __launch_bounds__(128) attnx_grad_query_sm90(const __grid_constant__ Args args) {
  using Input = typename Storage::Input;
  constexpr int kM = Tile::kM, kHeadDim = Tile::kHeadDim, kColumns = Tile::kGradQueryColumns;
  using RowTile = SharedTile<kM, kHeadDim>;
  extern __shared__ uint4 shared[];
  const std::uint32_t shared_rows = shared_address(shared);

  const Place place = Place::of(args, blockIdx.x);
  const auto& [head, batch, sequence, row_begin, row_end, row_tile] = place;
  if (row_begin >= row_end) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float4* from = reinterpret_cast<const float4*>(args.sums + row_tile * (kM * kHeadDim)) + threadIdx.x;
#pragma unroll
  for (int part = 0; part < Tile::kGradQueryParts * Tile::kWarpgroups; ++part) {
    Accumulators<16, kColumns> grad_query;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
      *reinterpret_cast<float4*>(grad_query[0][n]) = from[(part * (kColumns / 8) + n) * 128];
    const int row = Tile::first_row(part), feature = Tile::first_feature(part);
    const int own_row = row + (Tile::kSwapGradQuery ? 0 : warp * 16);
    const int own_feature = feature + (Tile::kSwapGradQuery ? warp * 16 : 0);
    float factor = args.scale;
    if (args.addend.data) {
      const auto addend =
          Storage::template query_rows<const float>(args, args.addend, batch, query_head_of(args, head), sequence);
      add_rows<Tile::kSwapGradQuery>(grad_query, factor, addend, row_begin + own_row, row_end, own_feature,
                                     int(args.head_dim), lane);
      factor = 1;
    }
    if constexpr (Tile::kSwapGradQuery)
      store_transposed<RowTile, Input>(shared_rows, own_row, own_feature, lane, grad_query, factor);
    else
      store_accumulators<RowTile, Input>(shared_rows, own_row, own_feature, lane, grad_query, factor);
  }
  __syncthreads();
  const auto rows =
      Storage::template query_rows<Input>(args, args.grad_query, batch, query_head_of(args, head), sequence);
  Storage::template store<RowTile, kM, 128>(shared_rows, 0, rows, row_begin, row_end, int(args.head_dim), threadIdx.x);
}

}  // namespace attnx::cuda
