// This replaces the states of a cache, when everything else is written: launches on a stream run in order.
#pragma once

#include "attnx/params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

void publish(const StaircaseAppendParams& params, const Launch& launch);
void publish(const StaircaseCropParams& params, const Launch& launch);

}  // namespace attnx::cuda
