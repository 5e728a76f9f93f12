// These bring the first plane's codes of 32 tokens and their ranges into a warp's shared memory, several turns ahead.
#pragma once

#include <algorithm>

#include "cuda/common/ptx.h"
#include "cuda/staircase/decode/place.h"

namespace attnx::cuda {

// A stage has codes of keys, codes of values, ranges of keys and ranges of values. Its memory serves the tail, too, and
// in the end the sums of a warp.
template <int kBits, int kHeadDim>
struct DecodeMemory {
  static constexpr int kCodes = kHeadDim * kBits * 4, kRanges = kHeadDim * 4;  // bytes, of keys or values
  static constexpr int kStage = 2 * (kCodes + kRanges);
  static constexpr int kStages = std::clamp(12288 / kStage, kStage <= 10240 ? 2 : 1, 6);
  static constexpr int kTail = 2 * kTailTokens * kHeadDim * 2;
  static constexpr int kWarp = std::max(kStages * kStage, kTail);
  static constexpr int kBlock = kDecodeWarps * kWarp;
};

template <int kBits, int kHeadDim>
class DecodeStages {
  using Memory = DecodeMemory<kBits, kHeadDim>;

  const DecodeArguments& args_;
  const char *codes_, *ranges_;  // of keys; those of values follow a matrix later
  int dim_;

  // The number of chunks of 16 bytes is known up to how far the head dimension is padded.
  template <int kMostBytes>
  static __device__ __forceinline__ void copy(std::uint32_t to, const char* from, int chunks) {
#pragma unroll
    for (int i = 0; i * 512 < kMostBytes; ++i) {
      const int chunk = i * 32 + threadIdx.x % 32;
      if (chunk < chunks) copy_async(to + chunk * 16, from + chunk * 16);
    }
  }

 public:
  std::uint32_t memory;  // of the warp

  __device__ __forceinline__ DecodeStages(const DecodeArguments& args, const DecodePlace& place, std::uint32_t memory)
      : args_(args),
        codes_(reinterpret_cast<const char*>(args.cache.codes_of(place.batch, place.head_k, kKeyMatrix))),
        ranges_(reinterpret_cast<const char*>(args.cache.ranges_of(place.batch, place.head_k, kKeyMatrix))),
        dim_(int(args.cache.layout.head_dim)),
        memory(memory) {}

  __device__ __forceinline__ std::uint32_t codes(int stage, int which) const {
    return memory + stage * Memory::kStage + which * Memory::kCodes;
  }
  __device__ __forceinline__ std::uint32_t ranges(int stage, int which) const {
    return memory + stage * Memory::kStage + 2 * Memory::kCodes + which * Memory::kRanges;
  }

  // This starts the copies of a turn. Codes and ranges of keys lie in order of the tokens; ranges of values lie so
  // within a window and a group of channels.
  __device__ __forceinline__ void start(int turn, int stage) const {
    const StaircaseLayout& layout = args_.cache.layout;
    const char* const from_codes = codes_ + std::int64_t(turn) * dim_ * (kBits * 4);
    copy<Memory::kCodes>(codes(stage, kKeyMatrix), from_codes, dim_ * kBits / 4);
    copy<Memory::kCodes>(codes(stage, kValueMatrix), from_codes + layout.words * 4, dim_ * kBits / 4);
    const std::int64_t group = args_.group_tiles.divide(turn);
    copy<Memory::kRanges>(ranges(stage, kKeyMatrix), ranges_ + group * dim_ * 4, dim_ / 4);
    int window = turn;
    const int tile = args_.window_tiles.split(window);
    const char* const from = ranges_ + (args_.matrix_ranges + window * args_.window_ranges + tile * kDecodeTokens) * 4;
#pragma unroll
    for (int i = 0; i * 512 < Memory::kRanges; ++i) {
      const int chunk = i * 32 + threadIdx.x % 32;
      if (chunk < args_.groups * 8)
        copy_async(ranges(stage, kValueMatrix) + chunk * 16, from + (chunk / 8 * layout.window * 4 + chunk % 8 * 16));
    }
  }
};

}  // namespace attnx::cuda
