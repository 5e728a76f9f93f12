// The kernels of one instruction set, as the dispatcher sees them.
#pragma once

#include <cstddef>

#include "attnx/params.h"
#include "executor.h"

namespace attnx::cpu {

struct Kernels {
  // Bytes that the run of the same name needs, aligned to 64.
  std::size_t (*forward_workspace)(const ForwardParams&, const Executor&);
  void (*forward)(const ForwardParams&, const Executor&, char* workspace);
  std::size_t (*backward_workspace)(const BackwardParams&, const Executor&);
  void (*backward)(const BackwardParams&, const Executor&, char* workspace);
  std::size_t (*linear_forward_workspace)(const LinearForwardParams&, const Executor&);
  void (*linear_forward)(const LinearForwardParams&, const Executor&, char* workspace);
  std::size_t (*linear_backward_workspace)(const LinearBackwardParams&, const Executor&);
  void (*linear_backward)(const LinearBackwardParams&, const Executor&, char* workspace);
  std::size_t (*routed_forward_workspace)(const ForwardParams&, const Executor&);
  void (*routed_forward)(const ForwardParams&, const Executor&, char* workspace);
  std::size_t (*routed_backward_workspace)(const BackwardParams&, const Executor&);
  void (*routed_backward)(const BackwardParams&, const Executor&, char* workspace);
  std::size_t (*select_workspace)(const SelectParams&, const Executor&);
  void (*select)(const SelectParams&, const Executor&, char* workspace);
  std::size_t (*nearest_workspace)(const NearestParams&, const Executor&);
  void (*nearest)(const NearestParams&, const Executor&, char* workspace);
  std::size_t (*centroid_sums_workspace)(const CentroidSumsParams&, const Executor&);
  void (*centroid_sums)(const CentroidSumsParams&, const Executor&, char* workspace);
};

}  // namespace attnx::cpu
