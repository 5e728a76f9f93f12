// These allocate results and workspace. Where there is no memory for them, the error says how much was asked for.
#pragma once

#include "check.h"

namespace attnx::ops {

// The dtype is that of like where it is not given.
StableTensor make_empty(const StableTensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                        std::optional<ScalarType> dtype = std::nullopt);
StableTensor make_zeros(const StableTensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                        std::optional<ScalarType> dtype = std::nullopt);

}  // namespace attnx::ops
