// These are the tensors of a call as the tensor memory accelerator sees them. This is host code.
#pragma once

#include "attnx/params.h"
#include "cuda/storage/tensor_map.h"

namespace attnx::cuda {

struct TmaForwardViews {
  TmaTensor query, key, value, output;
};
struct TmaBackwardViews {
  TmaTensor query, key, value, grad_output;
};

// One box holds rows of `group` query heads, which is 1 or all that share a key head.
TmaForwardViews tma_views(const ForwardParams& params, std::int64_t group);
TmaBackwardViews tma_views(const BackwardParams& params, std::int64_t group);

}  // namespace attnx::cuda
