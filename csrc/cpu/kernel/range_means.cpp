// This unit is compiled once for each instruction set, and picks the types.
#include "range_means.h"

#include "dtype.h"

namespace attnx::cpu::ATTNX_ISA {

std::size_t range_means_workspace(const RangeMeansParams& p, const Executor& executor) {
  return with_kernel<RangeMeans>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void range_means(const RangeMeansParams& p, const Executor& executor, char* workspace) {
  with_kernel<RangeMeans>(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA
