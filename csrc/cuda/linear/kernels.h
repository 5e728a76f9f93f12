// This picks a kernel of linear attention by the call's dtype and features.
#pragma once

#include <algorithm>

#include "cuda/common/device.h"
#include "cuda/common/element.h"
#include "cuda/linear/arguments.h"

namespace attnx::cuda {

// This counts the tiles of queries of a launch.
inline std::int64_t query_tiles(const LinearArguments& args) {
  return args.length_q == 0 ? 0 : args.units * args.heads_of_unit * args.query_blocks.divisor();
}

// This calls action.template operator()<kDim>() with what features and values are padded to.
template <class Action>
void with_linear_dim(const LinearArguments& args, const Action& action) {
  const std::int64_t dim = std::max(args.head_dim, args.value_dim);
  if (dim <= 64) return action.template operator()<64>();
  if (dim <= 128) return action.template operator()<128>();
  action.template operator()<256>();
}

// This calls action.template operator()<Input, kDim>().
template <class Action>
void with_linear_kernel(const LinearArguments& args, DType dtype, const Action& action) {
  const auto with_dtype = [&]<class Input>(Input) {
    with_linear_dim(args, [&]<int kDim>() { action.template operator()<Input, kDim>(); });
  };
  dtype == DType::kBFloat16 ? with_dtype(__nv_bfloat16()) : with_dtype(__half());
}

}  // namespace attnx::cuda
