// What the backward kernel for sm_90a is passed.
#pragma once

#include <cuda.h>

#include "cuda/arguments.h"

namespace attnx::cuda {

struct TmaBackwardArguments {
  CUtensorMap query, key, value, grad_output;  // (features, head of the group, row, head, batch)
  BackwardArguments args;
};

}  // namespace attnx::cuda
