// This defines the arguments of the kernels that sum over scores.
#pragma once

#include "cuda/mainloop/backward_arguments.h"

namespace attnx::cuda {

// Every row has two numbers, which a pass before lays out by tiles of rows, as BackwardScratch has them.
struct RowNumbers {
  BackwardGeometry layout;
  int rows_of_tile;
  const float* offset;  // [row]: what the row's logits get, times log2(e)
  const float* other;   // [row]: what the summand asks for besides; null where it asks for nothing
};

// Rows of a tile are those of one query head, so that the geometry's group is 1.
template <class Reduction, class Storage>
struct SumsArguments : Geometry, LogitScaling {
  RowNumbers rows;
  typename Storage::SumsTensors tensors;
  typename Reduction::Parameters reduction;
};

}  // namespace attnx::cuda
