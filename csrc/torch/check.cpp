#include "check.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "attnx/environment.h"

namespace attnx::ops {

namespace {

// With this the emulator's tensors are seen as a GPU's are: no check looks at values in host memory.
const bool kHostUnread = kCudaOnHost && is_one("ATTNX_HOST_UNREAD");

template <class Sizes>
std::ostream& write_shape(std::ostream& out, const Sizes& sizes) {
  const char* separator = "";
  out << "(";
  for (const auto size : sizes) out << std::exchange(separator, ", ") << size;
  return out << (sizes.size() == 1 ? ",)" : ")");
}

struct Shape {
  std::initializer_list<std::int64_t> sizes;
};
std::ostream& operator<<(std::ostream& out, const Shape& shape) { return write_shape(out, shape.sizes); }

}  // namespace

std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) { return write_shape(out, shape.tensor.sizes()); }

std::string to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "torch scalar type " + std::to_string(int(dtype));
  }
}
std::string dtype_of(const StableTensor& x) { return to_string(x.scalar_type()); }

DType to_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: return DType::kFloat32;
  }
}

ScalarType sum_type(const StableTensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::string device_of(const StableTensor& x) {
  if (x.is_cpu()) return "cpu";
  return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : "a device of another kind";
}

void check_dtype(std::string_view name, const StableTensor& x, ScalarType expected, const char* why) {
  check(x.scalar_type() == expected, name, ": expected ", to_string(expected), why, ", got ", dtype_of(x));
}

void check_shape(std::string_view name, const StableTensor& x, std::initializer_list<std::int64_t> expected) {
  const auto sizes = x.sizes();
  check(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, ": expected shape ",
        Shape{expected}, ", got ", shape_of(x));
}

void check_layout(std::string_view name, const StableTensor& x) {
  const std::int64_t last = x.dim() - 1;
  check(x.numel() == 0 || x.size(last) == 1 || x.stride(last) == 1, name,
        ": expected a contiguous last dimension (stride 1), got stride ", x.stride(last), "; call .contiguous()");
}

void check_contiguous(std::string_view name, const StableTensor& x) {
  check(x.is_contiguous(), name, ": expected a contiguous tensor, got one with other strides");
}

void check_length(std::string_view name, std::int64_t length) {
  constexpr std::int64_t kMost = std::int64_t(1) << 40;
  check(length >= 0, name, ": expected 0 or more, got ", length);
  check(length <= kMost, name, ": expected at most ", kMost, ", got ", length);
}

void check_round(const StableTensor& seed, const StableTensor& offset) {
  const auto check_number = [](const char* name, const StableTensor& x) {
    check_dtype(name, x, ScalarType::Long, "");
    check(x.dim() == 0, name, ": expected a tensor of shape (), got ", shape_of(x));
  };
  check_number("offset", offset);
  if (const auto values = values_on_host(offset)) {
    const std::int64_t round = *data<const std::int64_t>(*values);
    check(round >= 0 && round <= std::numeric_limits<std::uint32_t>::max(),
          "offset: expected a round from 0 to 4294967295, got ", round);
  }
  check_number("seed", seed);
}

std::optional<StableTensor> values_on_host(const StableTensor& x) {
  if (x.is_cpu() && !kHostUnread) return x;
  if (kDebug) return torch::stable::to(x, torch::headeronly::DeviceType::CPU);
  return std::nullopt;
}

}  // namespace attnx::ops
