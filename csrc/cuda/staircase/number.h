// This reads one number of a staircase cache, as append, crop and dequantize see it; attention unpacks fragments.
#pragma once

#include "attnx/staircase.h"
#include "cuda/common/element.h"

namespace attnx::cuda {

// This says where in the words of a block of 32 x 32 codes a code stands (attnx/staircase.h).
struct CodePlace {
  int word, bit;

  __device__ CodePlace(int row, int column, int bits) {
    const int k = column / 8 + row / 8 * 4;
    word = (k * bits / 16 * 4 + row % 8 / 2) * 8 + column % 8;
    bit = row % 2 * 16 + k * bits % 16;
  }
};

// This is the keys or the values of one head in one state.
template <class Element>
class NumbersOfHead {
  const StaircaseLayout& layout_;
  StaircaseState state_;
  bool keys_;
  const std::uint32_t* codes_;
  const __half* ranges_;
  const Element* tail_;
  std::int64_t first_;  // token of the tail

 public:
  __device__ NumbersOfHead(const Staircase& cache, const StaircaseState& state, std::int64_t batch, std::int64_t head,
                           int which)
      : layout_(cache.layout),
        state_(state),
        keys_(which == kKeyMatrix),
        codes_(cache.codes_of(batch, head, which)),
        ranges_(reinterpret_cast<const __half*>(cache.ranges_of(batch, head, which))),
        tail_(cache.tail_of<const Element>(batch, head, which, state.tail())),
        first_(layout_.windows_of(state.length()) * layout_.window) {}

  __device__ Element of_tail(std::int64_t token, int channel) const {
    return tail_[(token - first_) * layout_.head_dim + channel];
  }

  __device__ Element at(std::int64_t token, int channel) const {
    if (token >= first_) return of_tail(token, channel);
    const std::int64_t window = token / layout_.window;
    const int in_window = int(token - window * layout_.window);
    const int row = keys_ ? channel : in_window, column = keys_ ? in_window : channel;
    std::uint32_t code = 0;
    int bits = 0;
    for (int plane = 0; plane < layout_.planes; ++plane) {
      const std::int64_t slot = state_.slot(layout_, plane, window);
      if (slot < 0) break;
      const int own = layout_.plane[plane].bits;
      const CodePlace place(row % 32, column % 32, own);
      const std::uint32_t word = codes_[layout_.plane[plane].offset + slot * layout_.window_words(plane) +
                                        layout_.block_offset(plane, in_window, channel) + place.word];
      code = code << own | (word >> place.bit & ((1u << own) - 1));
      bits += own;
    }
    const std::int64_t rows = keys_ ? layout_.head_dim : layout_.window;
    const __half* const range = ranges_ + 2 * (window * layout_.window_ranges() + column / layout_.group * rows + row);
    // This is the middle of the cell. All is exact up to the addition, as on the CPU.
    const float half_cell = __half2float(range[1]) * float(1 << (8 - bits)) * 0.5f;
    return Element(fmaf(float(2 * code + 1), half_cell, __half2float(range[0])));
  }
};

}  // namespace attnx::cuda
