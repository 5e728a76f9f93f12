// This shows a call as a range on the timeline of Nsight Systems.
#pragma once

#include <nvtx3/nvToolsExt.h>

#include <string>

#include "attnx/policies.h"

namespace attnx::cuda {

class Range {
 public:
  explicit Range(const char* name) { nvtxRangePushA(name); }
  // The name is "attnx::softmax_attention", or that of another score, and a suffix.
  Range(Score score, const char* suffix) {
    nvtxRangePushA(("attnx::" + std::string(score_name(score)) + "_attention" + suffix).c_str());
  }
  ~Range() { nvtxRangePop(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

}  // namespace attnx::cuda
