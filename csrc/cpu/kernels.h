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
  std::size_t (*staircase_append_workspace)(const StaircaseAppendParams&, const Executor&);
  void (*staircase_append)(const StaircaseAppendParams&, const Executor&, char* workspace);
  std::size_t (*staircase_crop_workspace)(const StaircaseCropParams&, const Executor&);
  void (*staircase_crop)(const StaircaseCropParams&, const Executor&, char* workspace);
  std::size_t (*staircase_read_workspace)(const StaircaseReadParams&, const Executor&);
  void (*staircase_read)(const StaircaseReadParams&, const Executor&, char* workspace);
};

}  // namespace attnx::cpu
