// This maps a dtype to its CUDA type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attnx/params.h"

namespace attnx::cuda {

template <DType>
struct Element;
template <>
struct Element<DType::kBFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct Element<DType::kFloat16> {
  using Type = __half;
};

}  // namespace attnx::cuda
