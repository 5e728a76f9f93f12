// This tells on the device which blocks a round of probabilistic attention keeps.
#pragma once

#include "attnx/block_params.h"

namespace attnx::cuda {

// In the race of a fixed number of blocks, a row's finish is when its last block arrives, and the last block that is
// taken of those that arrive at that very time. Diagonal blocks do not run.
struct Finish {
  double time;
  std::int32_t last;

  // This tells whether a block that arrives then is taken.
  ATTNX_HOST_DEVICE bool takes(double arrival, int block) const {
    return arrival < time || (arrival == time && block <= last);
  }
};

struct Round {
  BlockGrid grid;  // of the longest sequence
  SequenceLengths lengths;
  std::int64_t heads, sequence_heads;  // of the batch, and of one sequence
  const float* keep;
  const std::int64_t *seed, *offset;
  Finish* finishes;  // [heads, query blocks]; null where each block is kept on its own

#ifdef __CUDACC__
  // These are the lengths of the sequence that a head belongs to, and its grid, whose other numbers need no registers.
  __device__ __forceinline__ int2 own_lengths(std::int64_t head) const {
    const bool alike = !lengths.cu_seqlens_q && !lengths.key_ends;
    const BlockGrid own = alike ? grid : lengths.own(grid, head / sequence_heads);
    return {int(own.length_q), int(own.length_k)};
  }
  __device__ __forceinline__ BlockGrid grid_of(int2 own) const {
    return {own.x, own.y, grid.block_q, grid.block_k, grid.is_causal};
  }
  __device__ __forceinline__ SamplingRound draws() const {
    return {std::uint64_t(__ldg(seed)), std::uint32_t(__ldg(offset))};
  }

  // These tell whether a candidate of row i of a head is kept, whose probability is p: on its own, or in the race.
  static __device__ __forceinline__ bool keeps(const SamplingRound& draws, std::int64_t head, int i, int j, float p) {
    return is_kept(draws.draw(head, i, j), p);
  }
  static __device__ __forceinline__ bool keeps(const SamplingRound& draws, std::int64_t head, int i, int j, float p,
                                               int distance, const Finish& finish) {
    if (distance == 0 || !(p > 0)) return distance == 0;
    return finish.takes(arrival_time(draws.draw(head, i, j), p), j);
  }
#endif
};

}  // namespace attnx::cuda
