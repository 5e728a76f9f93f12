// This is the refusal of tensors that TMA cannot read.
#pragma once

#include <initializer_list>
#include <string>

#include "cuda/storage/tensor_map.h"

namespace attnx::cuda {

struct NamedTmaTensor {
  const char* name;
  const TmaTensor& tensor;
};

// This returns what speaks against TMA in the first of these tensors that it cannot read, or nothing.
inline std::string why_not_tma(std::initializer_list<NamedTmaTensor> tensors) {
  for (const auto& [name, tensor] : tensors)
    if (!fits_tma(tensor))
      return std::string(name) + " does not start, or has strides that are not positive, on multiples of 16 bytes";
  return {};
}

}  // namespace attnx::cuda
