// The forward mainloops share this: which rows a tile holds, its weights as an operand, and its results where the keys
// are split.
#pragma once

#include "cuda/common/logits.h"
#include "cuda/common/ptx.h"
#include "cuda/mainloop/forward_arguments.h"

namespace attnx::cuda {

// This says which tile of rows a block owns.
struct ForwardPlace {
  int split, query_block, head, batch;
  Sequence sequence;
  int row_begin, row_end;  // of the tile; of the sequence

  // Neighbouring blocks share keys. Where the window ends at the query, the longest rows go first.
  template <class Args, class Tile>
  static __device__ __forceinline__ ForwardPlace of(const Args& args, int block, Tile) {
    ForwardPlace place;
    place.split = args.splits.split(block);
    place.query_block = args.query_blocks.split(block);
    place.head = args.heads.split(block);
    place.batch = block;
    if (args.right != kUnbounded) place.query_block = args.query_blocks.divisor() - 1 - place.query_block;
    place.sequence = sequence_of(args, place.batch);
    place.row_begin = place.query_block * Tile::kM;
    place.row_end = place.sequence.length_q * args.group.divisor();
    return place;
  }
};

// This is P as operand A: the accumulators of S hold the elements where the operand wants them, in pairs.
template <class ScorePolicy, class Logits, int kM, int kN>
struct Weights {
  float (&s)[kM][kN][4];
  ScorePolicy& score;
  const Logits& logits;

  __device__ __forceinline__ void load(std::uint32_t (&x)[4], int m, int k) const {
    m /= 16, k /= 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = m * 2 + i % 2, n = k + i / 2;
      const auto weight = [&](int e) { return logits.weight(score.weight(s[m][n][i % 2 * 2 + e], row), n, e); };
      const float low = weight(0), high = weight(1);
      x[i] = logits.kept(pack_nonnegative(low, high, typename ScorePolicy::Input()), row, n);
    }
  }
};

// This stores a thread's results of one share of the keys in the workspace. A tile has kRowsOfTile rows, and `row` is
// the thread's first.
template <bool kNormalised, int kRowsOfTile, int kM, int kD>
__device__ __forceinline__ void store_partial(const float (&output)[kM][kD][4], const float (&logsumexp)[kM * 2],
                                              const ForwardGeometry& args, const PartialResults& partial,
                                              const ForwardPlace& place, int row, int lane) {
  const std::int64_t rows = std::int64_t(args.query_blocks.divisor()) * kRowsOfTile;  // of a head
  const std::int64_t first = (place.batch * std::int64_t(args.heads.divisor()) + place.head) * rows + row;
  const std::int64_t rows_of_split = args.batch * args.heads.divisor() * rows;
#pragma unroll
  for (int r = 0; r < kM * 2; ++r) {
    if (kNormalised && lane % 4 == 0)
      partial.logsumexp[(first + row_of(r)) * args.splits.divisor() + place.split] = logsumexp[r];
    float* const to = partial.output + (place.split * rows_of_split + first + row_of(r)) * (kD * 8);
#pragma unroll
    for (int d = 0; d < kD; ++d)
      *reinterpret_cast<float2*>(to + d * 8 + lane % 4 * 2) =
          make_float2(output[r / 2][d][r % 2 * 2], output[r / 2][d][r % 2 * 2 + 1]);
  }
}

}  // namespace attnx::cuda
