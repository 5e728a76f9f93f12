// These bring the tokens of a turn into a stage of shared memory, several turns ahead.
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/staircase/decode/memory.h"

namespace attnx::cuda {

// Rows of the tail lie as they came, their chunks of 16 bytes swizzled.
template <int kHeadDim>
__device__ __forceinline__ std::uint32_t tail_chunk(std::uint32_t rows, int token, int chunk) {
  return rows + token * kHeadDim * 2 + (chunk ^ token % 8) * 16;
}

template <class Memory, int kBits, int kHeadDim>
class DecodeStages {
  static constexpr int kThreads = kDecodeWarps * 32;

  const DecodeArguments& args_;
  const DecodePlace& place_;
  // They are of keys; those of values follow a matrix later. They are computed once: there are registers for them.
  const std::uint32_t *codes_, *ranges_;
  std::uint32_t memory_;
  int dim_;

  __device__ __forceinline__ const std::uint32_t* codes(int which) const {
    return codes_ + which * args_.cache.layout.words;
  }
  __device__ __forceinline__ const std::uint32_t* ranges(int which) const {
    return ranges_ + which * args_.matrix_ranges;
  }

  // The number of chunks of 16 bytes is known up to how far the head dimension is padded.
  template <int kMostBytes>
  static __device__ __forceinline__ void copy(std::uint32_t to, const void* from, int chunks) {
#pragma unroll
    for (int i = 0; i < kMostBytes; i += kThreads * 16) {
      const int chunk = i / 16 + threadIdx.x;
      if (chunk < chunks) copy_async(to + chunk * 16, static_cast<const char*>(from) + chunk * 16);
    }
  }

  // Codes of the first plane lie in order of the tokens.
  template <int kMostTiles>
  __device__ __forceinline__ void copy_codes(std::uint32_t to, int which, const DecodeTurn& turn) const {
    copy<Memory::codes(kMostTiles, kBits)>(to, codes(which) + std::int64_t(turn.tile()) * dim_ * kBits,
                                           turn.tiles * dim_ * kBits / 4);
  }

  // So do ranges of keys. Ranges of values do within a window and a group of channels.
  template <DecodeKind kKind, int kMostTiles>
  __device__ __forceinline__ void copy_ranges(std::uint32_t stage, const DecodeTurn& turn) const {
    const int group = args_.group_tiles.divide(turn.tile());
    const int count = args_.group_tiles.divide(turn.tile() + turn.tiles - 1) - group + 1;
    copy<kMostTiles * kHeadDim * 4>(stage + Memory::template key_ranges_at<kKind>(),
                                    ranges(kKeyMatrix) + std::int64_t(group) * dim_, count * dim_ / 4);
#pragma unroll
    for (int i = 0; i < kMostTiles * Memory::kGroups * 8; i += kThreads) {
      const int at = i + int(threadIdx.x), chunk = at % 8, own = at / 8 % Memory::kGroups,
                tile = at / 8 / Memory::kGroups;
      if (tile >= turn.tiles || own >= args_.groups) continue;
      int window = turn.tile() + tile;
      const int token = args_.window_tiles.split(window) * kDecodeTokens;
      copy_async(
          value_ranges<kKind>(stage, tile, own) + chunk * 16,
          ranges(kValueMatrix) + window * args_.window_ranges + own * args_.cache.layout.window + token + chunk * 4);
    }
  }

  // A further plane follows those before it. Windows have slots in turn.
  __device__ __forceinline__ void copy_planes(std::uint32_t to, int which, const DecodeTurn& turn, int planes) const {
    const StaircaseLayout& layout = args_.cache.layout;
    int window = turn.tile();
    const int token = args_.window_tiles.split(window) * kDecodeTokens;
    int before = kBits;
#pragma unroll 1
    for (int p = 1; p < planes; ++p) {
      int slot = int(place_.state.newest(p)) - (place_.windows - window - 1);
      if (slot < 0) slot += int(layout.plane[p].slots);
      copy<Memory::codes(1, 4)>(
          to + before * dim_ * 4,
          codes(which) + layout.plane[p].offset + slot * layout.window_words(p) + layout.block_offset(p, token, 0),
          before * dim_ / 4);
      before *= 2;
    }
  }

  __device__ __forceinline__ void copy_tail(std::uint32_t to, int which, const DecodeTurn& turn) const {
    const std::uint16_t* const from =
        args_.cache.tail_of<const std::uint16_t>(place_.batch, place_.head_k, which, place_.state.tail()) +
        std::int64_t(turn.first - place_.tail_first) * dim_;
#pragma unroll
    for (int i = 0; i < kTailTokens * kHeadDim / 8; i += kThreads) {
      const int token = (i + int(threadIdx.x)) / (kHeadDim / 8), chunk = (i + int(threadIdx.x)) % (kHeadDim / 8);
      const bool inside = turn.first + token < place_.length && chunk * 8 < dim_;
      copy_async(tail_chunk<kHeadDim>(to, token, chunk), from + (inside ? token * dim_ + chunk * 8 : 0), inside);
    }
  }

 public:
  __device__ __forceinline__ DecodeStages(const DecodeArguments& args, const DecodePlace& place, std::uint32_t memory)
      : args_(args),
        place_(place),
        codes_(fresh(args.cache.codes_of(place.batch, place.head_k, kKeyMatrix))),
        ranges_(fresh(reinterpret_cast<std::uint32_t*>(args.cache.ranges) +
                      args.cache.matrix(place.batch, place.head_k, kKeyMatrix) * args.matrix_ranges)),
        memory_(memory),
        dim_(int(args.cache.layout.head_dim)) {}

  __device__ __forceinline__ std::uint32_t at(int stage) const { return memory_ + stage * Memory::kStage; }

  // The ranges of a tile's tokens, in a group of channels.
  template <DecodeKind kKind>
  static __device__ __forceinline__ std::uint32_t value_ranges(std::uint32_t stage, int tile, int group) {
    return stage + Memory::template value_ranges_at<kKind>() + (tile * Memory::kGroups + group) * Memory::kGroup;
  }
  // The ranges of channels, of the group that a tile of a turn is in.
  template <DecodeKind kKind>
  __device__ __forceinline__ std::uint32_t key_ranges(std::uint32_t stage, const DecodeTurn& turn, int tile) const {
    const int group = args_.group_tiles.divide(turn.tile() + tile) - args_.group_tiles.divide(turn.tile());
    return stage + Memory::template key_ranges_at<kKind>() + group * dim_ * 4;
  }

  // This counts the planes that hold the window of a turn.
  __device__ __forceinline__ int planes(const DecodeTurn& turn) const {
    const int age = place_.windows - args_.window_tiles.divide(turn.tile());
    int planes = 1;
    while (planes < args_.cache.layout.planes && age <= int(place_.state.refined(planes))) ++planes;
    return planes;
  }

  // This starts the copies of a turn.
  __device__ __forceinline__ void start(int number, int stage) const {
    const DecodeTurn turn = place_.turn(number);
    const std::uint32_t to = at(stage);
    if (turn.kind == DecodeKind::kPlain) {
      constexpr DecodeKind kKind = DecodeKind::kPlain;
      copy_codes<Memory::kTurnTiles>(to, kKeyMatrix, turn);
      copy_codes<Memory::kTurnTiles>(to + Memory::template values_at<kKind>(), kValueMatrix, turn);
      return copy_ranges<kKind, Memory::kTurnTiles>(to, turn);
    }
    constexpr DecodeKind kKind = DecodeKind::kRefined;
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      const std::uint32_t own = to + which * Memory::template values_at<kKind>();
      if (turn.kind == DecodeKind::kTail) {
        copy_tail(own, which, turn);
      } else {
        copy_codes<1>(own, which, turn);
        copy_planes(own, which, turn, planes(turn));
      }
    }
    if (turn.kind == DecodeKind::kRefined) copy_ranges<kKind, 1>(to, turn);
  }
};

}  // namespace attnx::cuda
