#include "memory.h"

#include <torch/csrc/stable/ops.h>

#include "attnx/out_of_memory.h"

namespace attnx::ops {

namespace {

double size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Char:
    case ScalarType::Byte: return 1;
    default: return 4;
  }
}

template <class Allocate>
StableTensor allocate(const StableTensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                      const std::optional<ScalarType>& dtype, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    // A double holds the product, too, where an integer would overflow.
    double bytes = size_of(dtype.value_or(like.scalar_type()));
    std::string sizes;
    for (const std::int64_t size : shape) {
      bytes *= double(size);
      sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    }
    std::ostringstream message;
    message.precision(3);
    message << "memory: expected " << bytes << " bytes on " << device_of(like) << " for a result of shape (" << sizes
            << "), got none";
    throw OutOfMemory(message.str());
  }
}

}  // namespace

StableTensor make_empty(const StableTensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                        std::optional<ScalarType> dtype) {
  return allocate(like, shape, dtype, [&] { return torch::stable::new_empty(like, shape, dtype); });
}

StableTensor make_zeros(const StableTensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                        std::optional<ScalarType> dtype) {
  return allocate(like, shape, dtype, [&] { return torch::stable::new_zeros(like, shape, dtype); });
}

StableTensor make_contiguous(const StableTensor& x) {
  return x.is_contiguous() ? x : allocate(x, x.sizes(), {}, [&] { return torch::stable::contiguous(x); });
}

}  // namespace attnx::ops
