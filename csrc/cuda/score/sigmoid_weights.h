// This applies the sigmoid of the kernels to an array of logits: it is a hook for the tests of its accuracy.
#pragma once

#include "attnx/params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

// This sets weights[i] = sigmoid(logits[i]) as the kernels compute it for the dtype, or by the exact formula, which is
// the oracle of the fast one. Both arrays are in device memory.
void sigmoid_weights(const float* logits, float* weights, std::int64_t n, DType dtype, bool exact,
                     const Launch& launch);

}  // namespace attnx::cuda
