// This launches the decoding kernel of a first plane of so many bits. Each number of bits has a unit of its own.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/staircase/decode/arguments.h"

namespace attnx::cuda {

// Head dimensions are padded to these.
inline constexpr int kDecodeHeadDims[] = {64, 128, 256};

template <int kBits>
void launch_decode(const DecodeArguments& args, std::int64_t blocks, cudaStream_t stream);

}  // namespace attnx::cuda
