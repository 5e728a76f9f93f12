// This says which tile of rows a block makes, of the kernels that make dQ from its sums.
#pragma once

#include "cuda/common/sequence.h"
#include "cuda/mainloop/grad_query_arguments.h"

namespace attnx::cuda {

template <class Tile>
struct GradQueryPlace {
  int head, batch;
  Sequence sequence;
  int row_begin, row_end;
  std::int64_t row_tile;  // where its sums lie among those of all heads

  static __device__ __forceinline__ GradQueryPlace of(const GradQueryArguments& args, int block) {
    GradQueryPlace place;
    const int query_block = args.query_blocks.split(block);
    place.batch = block % int(args.batch);
    place.head = block / int(args.batch);
    place.sequence = sequence_of(args, place.batch);
    place.row_begin = query_block * Tile::kM;
    place.row_end = place.sequence.length_q * args.group.divisor();
    place.row_tile =
        place.head * args.row_tiles + row_tile_of(args, place.batch, place.sequence, query_block, Tile::kM);
    return place;
  }
};

}  // namespace attnx::cuda
