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

// These are the tokens of one head from one on that is a multiple of 32. They are all in one window, or behind the
// last.
template <StaircaseMatrix kWhich>
struct StaircaseTokens {
  const StaircaseTensor<kWhich>& from;
  int batch, head;
  int token;  // the first

  __device__ __forceinline__ const StaircaseLayout& layout() const { return from.cache.layout; }
  __device__ __forceinline__ StaircaseState state() const { return from.cache.of(batch); }
  __device__ __forceinline__ int windows(int length) const {
    return from.window_tiles.divide(max(length - int(layout().residual), 0) / int(kCodeBlock));
  }

  // This starts copies of the channels from one on in the tail, and of zeros in place of other tokens and channels.
  template <class Tile, class Element>
  __device__ __forceinline__ void copy_tail(std::uint32_t tile, int row, int channel, int first, int length) const {
    const int lane = fresh(threadIdx.x) % 32, own = lane / 4, at = channel + lane % 4 * 8;
    const Element* const rows = from.cache.template tail_of<const Element>(batch, head, kWhich, state().tail()) +
                                std::int64_t(token - first) * layout().head_dim + at;
    const int count = at < layout().head_dim ? length - token : 0;
#pragma unroll
    for (int i = 0; i < kCodeBlock; i += 8)
      copy_async(tile + Tile::offset(row + own + i, at / 8), rows + (own + i) * layout().head_dim, own + i < count);
  }

  // This unpacks the channels from one on, in one of so many windows.
  template <class Tile, class Element>
  __device__ __forceinline__ void unpack(std::uint32_t tile, int row, int channel, int windows) const {
    const int lane = fresh(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    int window = token / int(kCodeBlock);
    const int in_window = from.window_tiles.split(window) * int(kCodeBlock);

    const bool keys = kWhich == kKeyMatrix;
    const int column = keys ? in_window : channel, row_of_ranges = keys ? channel : in_window;
    const std::int64_t rows = keys ? layout().head_dim : layout().window;
    const auto* ranges = reinterpret_cast<const std::uint32_t*>(from.cache.ranges_of(batch, head, kWhich)) +
                         window * layout().window_ranges() + from.group_tiles.divide(column / int(kCodeBlock)) * rows +
                         row_of_ranges + 2 * t;
    uint2 range[4];  // of rows 8f + 2t and 8f + 2t + 1
#pragma unroll
    for (int f = 0; f < 4; ++f) range[f] = __ldg(reinterpret_cast<const uint2*>(ranges + 8 * f));

    std::uint32_t codes[8] = {};
    int bits = 0;
#pragma unroll 1
    for (int p = 0; p < layout().planes; ++p) {
      const StaircasePlane& plane = layout().plane[p];
      int slot = window;
      if (p > 0) {
        const int behind = windows - 1 - window;  // windows that are newer
        if (behind >= int(state().refined(p))) break;
        slot = int(state().newest(p)) - behind;
        if (slot < 0) slot += int(plane.slots);
      }
      const std::uint32_t* const words = from.cache.codes_of(batch, head, kWhich) + plane.offset +
                                         slot * layout().window_words(p) +
                                         layout().block_offset(p, in_window, channel) + t * 8 + g;
      switch (plane.bits) {
        case 1: add_plane<1>(codes, words, bits); break;
        case 2: add_plane<2>(codes, words, bits); break;
        case 4: add_plane<4>(codes, words, bits); break;
        default: add_plane<8>(codes, words, bits);
      }
      bits += plane.bits;
    }
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
        if (!keys) pair = transpose(pair);
        store_shared(tile + Tile::offset(row + 8 * (keys ? j : f) + g, channel / 8 + (keys ? f : j)) + t * 4, pair);
      }
    }
  }
};

}  // namespace attnx::cuda
