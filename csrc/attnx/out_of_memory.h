// This is the error of an allocation that failed. It says how much was asked for; the operator puts its name before it.
#pragma once

#include <stdexcept>

namespace attnx {

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace attnx
