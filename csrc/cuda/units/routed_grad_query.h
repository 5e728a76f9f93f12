// The pass that makes dQ of clusters is told this, and finds its tile of rows so.
#pragma once

#include "cuda/mainloop/grad_query_arguments.h"
#include "cuda/tiles/clustered.h"
#include "cuda/units/routed_call.h"

namespace attnx::cuda {

struct ClusterGradQueryArguments : GradQueryArguments {
  ClusterTable tiles;  // of rows
};

inline ClusterGradQueryArguments grad_query_arguments(const RoutedBackwardCall& call) {
  return {{call.geometry, call.scaling.scale, call.scratch.grad_query_sum, call.grad_query, {}}, call.rows};
}

// This says which tile of rows a block makes, as GradQueryPlace does.
template <class Tile>
struct ClusterGradQueryPlace {
  int head, batch;
  ClusterSequence sequence;
  int row_begin, row_end;
  std::int64_t row_tile;

  static __device__ __forceinline__ ClusterGradQueryPlace of(const ClusterGradQueryArguments& args, int block) {
    const ClusterPlace place = ClusterPlace::of(args, block, Tile());
    return {place.head, place.batch, place.sequence, place.row_begin, place.row_end, block};
  }
};

}  // namespace attnx::cuda
