// These check what a user passed. They throw std::runtime_error, which is RuntimeError in Python, like the errors of
// torch's own operators. It is the one type that torch 2.13, 2.14 and 2.15 alike pass through the boxed call (2.15
// turns all others into it).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "attnx/params.h"

namespace attnx::ops {

using StableTensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

template <class T>
T* data(const StableTensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// It is written as text like "(2, 8, 128, 64)", which costs nothing before an error is.
struct ShapeOf {
  const StableTensor& tensor;
};
inline ShapeOf shape_of(const StableTensor& x) { return {x}; }
std::ostream& operator<<(std::ostream& out, const ShapeOf& shape);
// It returns the name that torch has for it, like "float32".
std::string dtype_of(const StableTensor& x);
std::string to_string(ScalarType dtype);
// It returns the dtype as kernels know it; one that they do not take counts as float32.
DType to_dtype(ScalarType dtype);
// It returns the type that sums are kept in, which bias, slopes, sinks and logsumexp have.
ScalarType sum_type(const StableTensor& query);
// It returns text like "cpu" or "cuda:1".
std::string device_of(const StableTensor& x);

void check_dtype(std::string_view name, const StableTensor& x, ScalarType expected, const char* why);
void check_shape(std::string_view name, const StableTensor& x, std::initializer_list<std::int64_t> expected);
// It checks that the last dimension is contiguous.
void check_layout(std::string_view name, const StableTensor& x);
void check_contiguous(std::string_view name, const StableTensor& x);

// It checks a length that is given as a number. It may not be so large that sums of a few of them overflow.
void check_length(std::string_view name, std::int64_t length);

// It checks the two numbers that random draws are keyed by: int64 tensors of one element, the offset from 0 to 2^32
// - 1.
void check_round(const StableTensor& seed, const StableTensor& offset);

// It returns the tensor in host memory, for checks that read its values: a CPU tensor itself, a copy of another one
// under ATTNX_DEBUG=1, and none otherwise, as copying waits for the device.
std::optional<StableTensor> values_on_host(const StableTensor& x);

}  // namespace attnx::ops
