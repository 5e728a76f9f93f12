// This launches the decoding kernel of a first plane of so many bits and of so many tiles of rows. Those of a plane
// share a file.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/staircase/decode/arguments.h"

namespace attnx::cuda {

// Head dimensions are padded to these, and tiles of rows to those. Eight tiles of 256 features are more than registers
// hold.
inline constexpr int kDecodeHeadDims[] = {64, 128, 256};
inline constexpr int kDecodeTiles[] = {1, 2, 4, 8};
inline constexpr int most_decode_tiles(std::int64_t head_dim) { return head_dim <= 128 ? 8 : 4; }

template <int kBits, int kTiles>
void launch_decode(const DecodeArguments& args, std::int64_t blocks, cudaStream_t stream);

}  // namespace attnx::cuda
