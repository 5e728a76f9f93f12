// This pools rows. It launches one kernel.
#pragma once

#include <cstddef>

#include "attnx/range_means_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

inline std::size_t range_means_workspace(const RangeMeansParams&, const Launch&) { return 0; }
void range_means(const RangeMeansParams& params, const Launch& launch);

}  // namespace attnx::cuda
