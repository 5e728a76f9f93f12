// This unpacks tokens of a staircase cache (attnx/staircase.h) into a tile of rows in shared memory, to the numbers
// that dequantize gives, in the dtype of the call.
//
// A warp takes blocks of 32 tokens x 32 channels. The planes of a code are put together as bytes first, so that what
// follows is the same for every number of bits. A lane's codes are pairs of neighbouring rows in columns of its own:
// neighbouring channels of keys, and of values neighbouring tokens, which become channels by a transposition of 8 x 8
// numbers. So eight lines of 16 bytes are stored at a time, and the swizzle leads them to different banks.
#pragma once

#include "cuda/common/ptx.h"
#include "cuda/storage/staircase_tensors.h"

namespace attnx::cuda {

// This transposes an 8 x 8 matrix of 16-bit numbers, of which lane 4i + j has numbers 2j and 2j + 1 of row i.
__device__ __forceinline__ std::uint32_t transpose(std::uint32_t x) {
  std::uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// This adds the bits of a plane to codes of which `above` bits are known. Byte b of `codes[i]` has, from its top, the
// code of row 2t + b / 2 and column g + 8 of the block where k is 2i + b % 2. `words` are the lane's in the plane.
template <int kBits>
__device__ __forceinline__ void add_plane(std::uint32_t (&codes)[8], const std::uint32_t* words, int above) {
  constexpr std::uint32_t kMask = ((1u << kBits) - 1) * 0x10001;
  const auto moved = [](std::uint32_t word, int from, int to) {
    return (from <= to ? word << (to - from) : word >> (from - to)) & kMask << to;
  };
  std::uint32_t own[kBits];
#pragma unroll
  for (int w = 0; w < kBits; ++w) own[w] = __ldg(words + w * 32);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int bit = 2 * i * kBits % 16;
    const std::uint32_t word = own[2 * i * kBits / 16];
    codes[i] |= (moved(word, bit, 8 - kBits) | moved(word, bit + kBits, 16 - kBits)) >> above;
  }
}

// These are 32 tokens of one head, in one window or behind the last one, and some channels of theirs.
template <class Tile, class Element, StaircaseMatrix kWhich>
class StaircaseTokens {
  static constexpr int kSide = kCodeBlock;  // of a block of codes
  static constexpr bool kKeys = kWhich == kKeyMatrix;

  const StaircaseTensor<kWhich>& from_;
  const int batch_, head_, token_;  // the first token
  const std::uint32_t tile_;        // of shared memory
  const int row_;                   // of the tile, that of the first token
  const int lane_, g_ = lane_ / 4, t_ = lane_ % 4;

  __device__ __forceinline__ const StaircaseLayout& layout() const { return from_.cache.layout; }
  __device__ __forceinline__ StaircaseState state() const { return from_.cache.of(batch_); }

  // A lane's ranges lie here, pairs of (minimum, step) of rows 2t and 2t + 1 of a block, and so on by 8.
  __device__ __forceinline__ const std::uint32_t* ranges(int window, int tile_in_window, int channel) const {
    const auto* const all = reinterpret_cast<const std::uint32_t*>(from_.cache.ranges) +
                            from_.cache.matrix(batch_, head_, kWhich) * from_.matrix_ranges + 2 * t_;
    if (kKeys) return all + from_.group_tiles.divide(token_ / kSide) * layout().head_dim + channel;
    return all + (window * from_.groups + from_.group_tiles.divide(channel / kSide)) * layout().window +
           tile_in_window * kSide;
  }

  // A lane's words of a plane lie here, of a window that has this slot.
  __device__ __forceinline__ const std::uint32_t* words(int p, int slot, int tile_in_window, int channel) const {
    const StaircasePlane& plane = layout().plane[p];
    const int block =
        (slot * from_.window_tiles.divisor() + tile_in_window) * (int(layout().head_dim) / kSide) + channel / kSide;
    return from_.cache.codes_of(batch_, head_, kWhich) + plane.offset + std::int64_t(block) * (kSide * plane.bits) +
           t_ * 8 + g_;
  }

  // This adds the bits of planes beyond the first that hold a window, `behind` windows being newer. It returns how many
  // bits are known then.
  __device__ __forceinline__ int add_planes(std::uint32_t (&codes)[8], int bits, int behind, int tile_in_window,
                                            int channel) const {
#pragma unroll 1
    for (int p = 1; p < layout().planes && behind < int(state().refined(p)); ++p) {
      int slot = int(state().newest(p)) - behind;
      if (slot < 0) slot += int(layout().plane[p].slots);
      const std::uint32_t* const own = words(p, slot, tile_in_window, channel);
      switch (bits) {
        case 1: add_plane<1>(codes, own, bits); break;
        case 2: add_plane<2>(codes, own, bits); break;
        default: add_plane<4>(codes, own, bits);
      }
      bits *= 2;
    }
    return bits;
  }

 public:
  __device__ __forceinline__ StaircaseTokens(const StaircaseTensor<kWhich>& from, int batch, int head, int token,
                                             std::uint32_t tile, int row)
      : from_(from),
        batch_(batch),
        head_(head),
        token_(token),
        tile_(tile),
        row_(row),
        lane_(fresh(threadIdx.x) % 32) {}

  __device__ __forceinline__ int windows(int length) const {
    return from_.window_tiles.divide(max(length - int(layout().residual), 0) / kSide);
  }

  // This starts copies of 32 channels in the tail, which begins with token `first`, and of zeros in place of other
  // tokens and channels.
  __device__ __forceinline__ void copy_tail(int channel, int first, int length) const {
    const int own = lane_ / 4, at = channel + lane_ % 4 * 8;
    const Element* const rows = from_.cache.template tail_of<const Element>(batch_, head_, kWhich, state().tail()) +
                                std::int64_t(token_ - first) * layout().head_dim + at;
    const int count = at < layout().head_dim ? length - token_ : 0;
#pragma unroll
    for (int i = 0; i < kSide; i += 8)
      copy_async(tile_ + Tile::offset(row_ + own + i, at / 8), rows + (own + i) * layout().head_dim, own + i < count);
  }

  // This unpacks 32 channels in one of so many windows.
  __device__ __forceinline__ void unpack(int channel, int windows) const {
    int window = token_ / kSide;
    const int tile_in_window = from_.window_tiles.split(window);
    const std::uint32_t* const own_ranges = ranges(window, tile_in_window, channel);
    uint2 range[4];  // of rows 8f + 2t and 8f + 2t + 1
#pragma unroll
    for (int f = 0; f < 4; ++f) range[f] = __ldg(reinterpret_cast<const uint2*>(own_ranges + 8 * f));

    std::uint32_t codes[8] = {};
    const std::uint32_t* const first = words(0, window, tile_in_window, channel);
    int bits = layout().plane[0].bits;
    switch (bits) {
      case 1: add_plane<1>(codes, first, 0); break;
      case 2: add_plane<2>(codes, first, 0); break;
      case 4: add_plane<4>(codes, first, 0); break;
      default: add_plane<8>(codes, first, 0);
    }
    const int behind = windows - 1 - window;
    if (behind < int(layout().plane[1].windows)) bits = add_planes(codes, bits, behind, tile_in_window, channel);
    const float middle = float(1 << (8 - bits)) * 0.5f;  // of the lowest cell, in steps

#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const auto low = [](std::uint32_t x) { return __half2float(__ushort_as_half(std::uint16_t(x))); };
      const float least[2] = {low(range[f].x), low(range[f].y)},
                  step[2] = {low(range[f].x >> 16), low(range[f].y >> 16)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // A byte below the bits of 2^23 is the float 2^23 + byte. All is exact up to the addition of the minimum.
        const auto number = [&](int e) {
          const std::uint32_t bits_of = __byte_perm(codes[2 * f + j / 2], 0x4b000000, 0x7440 | (2 * e + j % 2));
          return fmaf(__uint_as_float(bits_of) - (8388608.0f - middle), step[e], least[e]);
        };
        std::uint32_t pair = pack(number(0), number(1), Element());
        if (!kKeys) pair = transpose(pair);
        store_shared(tile_ + Tile::offset(row_ + 8 * (kKeys ? j : f) + g_, channel / 8 + (kKeys ? f : j)) + t_ * 4,
                     pair);
      }
    }
  }
};

}  // namespace attnx::cuda
