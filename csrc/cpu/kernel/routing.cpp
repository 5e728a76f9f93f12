// Compiled once per instruction set; picks the types.
#include "dtype.h"
#include "routing/nearest.h"
#include "routing/select.h"

namespace attnx::cpu::ATTNX_ISA {

std::size_t select_workspace(const SelectParams& p, const Executor& executor) {
  return with_kernel<Select>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void select(const SelectParams& p, const Executor& executor, char* workspace) {
  with_kernel<Select>(p, executor, [&](const auto& f) { f.run(workspace); });
}

std::size_t nearest_workspace(const NearestParams& p, const Executor& executor) {
  return with_kernel<Nearest>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void nearest(const NearestParams& p, const Executor& executor, char* workspace) {
  with_kernel<Nearest>(p, executor, [&](const auto& f) { f.run(workspace); });
}

std::size_t centroid_sums_workspace(const CentroidSumsParams& p, const Executor& executor) {
  return with_kernel<CentroidSums>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void centroid_sums(const CentroidSumsParams& p, const Executor& executor, char* workspace) {
  with_kernel<CentroidSums>(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA
