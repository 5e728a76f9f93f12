// This defines the arguments of the kernels that sum over scores.
#pragma once

#include "cuda/mainloop/backward_arguments.h"

namespace attnx::cuda {

// These numbers of rows a pass before the backward has laid out by tiles of rows, as BackwardScratch says.
struct RowsOfBackward {
  BackwardGeometry layout;
  int rows_of_tile;
  const float *offset, *delta;
};

struct RowsOfSharpened : RowsOfBackward {
  SharpenedRow* sharpened;
};

struct RowsOfTerms : RowsOfBackward {
  bool of_factors;  // gradients are those of factors of weights, not of logits; the same where weights are normalised
};

// Rows of a tile are those of one query head, so that the geometry's group is 1. The summand says which numbers rows
// have, and the reduction what it sums to.
template <class Rows, class Reduction, class Storage, class Logits>
struct SumsArguments : Geometry, Logits::Arguments {
  Rows rows;
  typename Storage::SumsTensors tensors;
  typename Reduction::Parameters reduction;
};

}  // namespace attnx::cuda
