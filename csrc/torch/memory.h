// These allocate results, workspace and copies. Where there is no memory for them, they throw OutOfMemory.
#pragma once

#include "check.h"

namespace attnx::ops {

// The dtype is that of like where it is not given.
StableTensor make_empty(const StableTensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                        std::optional<ScalarType> dtype = std::nullopt);
StableTensor make_zeros(const StableTensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                        std::optional<ScalarType> dtype = std::nullopt);

// This is x, or a copy of it, whose elements lie one after the other.
StableTensor make_contiguous(const StableTensor& x);

}  // namespace attnx::ops
