// Tensor maps tell TMA where a tensor lies and how it is cut into boxes. This is host code.
#pragma once

#include <cuda.h>

#include "attnx/params.h"

namespace attnx::cuda {

// This is a tensor of 16-bit elements as TMA sees it: (features, heads of a group, rows, groups of heads, batch).
struct TmaTensor {
  DType dtype;
  Tensor tensor;
  std::int64_t features, group, rows, heads, batch;  // heads of all groups
};

// This tells whether TMA can read or write the tensor: it starts on 16 bytes, its strides are positive multiples of 16
// bytes below 2^40 wherever there is more than one element, and there is an element.
bool fits_tma(const TmaTensor& x);

// The map's boxes hold 64 features of all heads of a group, and as many rows as make box_rows with the heads, with
// 128-byte swizzle.
CUtensorMap make_tensor_map(const TmaTensor& x, int box_rows);

}  // namespace attnx::cuda
