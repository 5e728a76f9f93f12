// This defines the arguments of the forward kernels.
#pragma once

#include "cuda/common/geometry.h"

namespace attnx::cuda {

struct ForwardGeometry : Geometry {
  Divisor splits;  // shares of the keys
};

// These are the results by split, where there are several: [split][tile][row][feature] and [tile][row][split].
struct PartialResults {
  float *output = nullptr, *logsumexp = nullptr;
};

// Every policy brings the parameters that its own code reads.
template <class Score, class Tiles, class Storage, class Logits>
struct ForwardArguments : ForwardGeometry, Logits::Arguments {
  typename Storage::ForwardTensors tensors;
  Tensor logsumexp;  // of normalised scores; null where it is not wanted
  typename Score::Parameters score;
  typename Tiles::ForwardParameters tiles;
  PartialResults partial;
};

}  // namespace attnx::cuda
