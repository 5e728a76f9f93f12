// From a dtype to the type of its elements: Input in what is compiled for one, and a switch in the rest.
#pragma once

#include "../executor.h"
#include "attnx/params.h"
#include "convert.h"

namespace attnx::cpu::ATTNX_ISA {

// ATTNX_DTYPE is one of these.
namespace float32 {
using Input = float;
}
namespace bfloat16 {
using Input = BFloat16;
}
namespace float16 {
using Input = Float16;
}
namespace float64 {
using Input = double;
}

// Calls action.template operator()<Input>(), of elements of this dtype.
template <class Action>
inline auto with_input(DType dtype, const Action& action) {
  switch (dtype) {
    case DType::kBFloat16: return action.template operator()<BFloat16>();
    case DType::kFloat16: return action.template operator()<Float16>();
    case DType::kFloat64: return action.template operator()<double>();
    default: return action.template operator()<float>();
  }
}

// Calls use(kernel), the kernel of the call's dtype.
template <template <class> class Kernel, class Params, class Use>
inline auto with_kernel(const Params& p, const Executor& executor, const Use& use) {
  return with_input(p.dtype, [&]<class Input>() { return use(Kernel<Input>(p, executor)); });
}

}  // namespace attnx::cpu::ATTNX_ISA
