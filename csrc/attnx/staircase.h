// This says how the numbers of a staircase KV cache lie in memory, which is the same for the CPU and the GPU;
// docs/notes/staircase.md draws it.
//
// Keys and values of a window are matrices whose columns are quantised in groups that share a range: keys with
// channels as rows and tokens as columns, values with tokens as rows and channels as columns.
#pragma once

#include <cstdint>

#include "attnx/host_device.h"

// Kernels are compiled once per instruction set, and of what is not inlined the linker would keep one copy for all.
#define ATTNX_LAYOUT_INLINE [[gnu::always_inline]] ATTNX_HOST_DEVICE inline

namespace attnx {

enum StaircaseMatrix : int { kKeyMatrix, kValueMatrix };

// Codes come in blocks of 32 rows x 32 columns, 32 words for each bit of a plane. Row 8f + 2t + e and column 8j + g
// stand in word [kb / 16][t][g] at bit 16e + kb % 16, where k = j + 4f and b the bits of the plane. On the CPU eight
// neighbouring words hold eight neighbouring columns of a row. On the GPU the thread with groupID g and
// threadID_in_group t finds in its words what it holds of the A fragment of mma.m16n8k16 (PTX ISA, its matrix
// fragments), with columns on M and rows on K: halves of a word are neighbours in K.
inline constexpr std::int64_t kCodeBlock = 32;

struct StaircasePlane {
  int bits;              // of a code that this plane holds
  std::int64_t windows;  // that read it, the newest ones; all of them, of the first plane
  std::int64_t slots;    // for windows: twice as many, so that an append overwrites none that is read before it
  std::int64_t offset;   // in words, from the start of the matrix
};

struct StaircaseLayout {
  static constexpr int kMaxLevels = 32;
  static constexpr int kMaxPlanes = 4;

  // The newest `residual` tokens are never quantised.
  std::int64_t window = 0, group = 0, residual = 0, head_dim = 0, max_length = 0, max_windows = 0;
  int planes = 0;
  StaircasePlane plane[kMaxPlanes] = {};
  std::int64_t words = 0;  // of codes, of a matrix of one head

  // The levels are 16, then 8, 4, 2 or 1, none larger than the one before. The first plane has the bits of the last
  // level, and each further one doubles what stands before it.
  StaircaseLayout() = default;
  StaircaseLayout(const std::int64_t* levels, int count, std::int64_t window, std::int64_t group, std::int64_t residual,
                  std::int64_t head_dim, std::int64_t max_length)
      : window(window),
        group(group),
        residual(residual),
        head_dim(head_dim),
        max_length(max_length),
        max_windows(windows_of(max_length)) {
    for (int total = int(levels[count - 1]); total <= levels[1]; total *= 2) {
      StaircasePlane& p = plane[planes];
      p.bits = planes == 0 ? total : total / 2;
      if (planes == 0) {
        p.windows = p.slots = max_windows;
      } else {
        for (int m = 1; m < count && levels[m] >= total && p.windows < max_windows; ++m) ++p.windows;
        p.slots = 2 * p.windows;
      }
      p.offset = words;
      words += p.slots * window_words(planes);
      ++planes;
    }
  }

  // It returns how many windows a sequence of this length has; the tokens after them are its tail.
  ATTNX_LAYOUT_INLINE std::int64_t windows_of(std::int64_t length) const {
    return length < residual ? 0 : (length - residual) / window;
  }

  ATTNX_LAYOUT_INLINE std::int64_t window_words(int p) const { return window * head_dim * plane[p].bits / 32; }
  ATTNX_LAYOUT_INLINE std::int64_t block_words(int p) const { return kCodeBlock * plane[p].bits; }
  // It tells where the block of codes of these tokens and channels starts within its window.
  ATTNX_LAYOUT_INLINE std::int64_t block_offset(int p, std::int64_t token, std::int64_t channel) const {
    return (token / kCodeBlock * (head_dim / kCodeBlock) + channel / kCodeBlock) * block_words(p);
  }

  // Ranges are pairs (minimum, step of 8 bits) in float16, [columns / group][rows] of a window.
  ATTNX_LAYOUT_INLINE std::int64_t window_ranges() const { return window * head_dim / group; }
  ATTNX_LAYOUT_INLINE std::int64_t matrix_ranges() const { return max_windows * window_ranges(); }

  // The tail is the tokens after the last window as they came, [tokens][head_dim], in one of two slots.
  static constexpr std::int64_t kTailSlots = 2;
  ATTNX_LAYOUT_INLINE std::int64_t tail_tokens() const { return window + residual; }
  ATTNX_LAYOUT_INLINE std::int64_t tail_slot() const { return tail_tokens() * head_dim; }
  ATTNX_LAYOUT_INLINE std::int64_t matrix_tail() const { return kTailSlots * tail_slot(); }

  // The state is what is known of a sequence: its length, the slot of its tail, and of each plane but the first the
  // slot of the newest window and how many of the newest windows it holds.
  ATTNX_LAYOUT_INLINE std::int64_t state_size() const { return 2 * planes; }
};

// This is the state of a sequence, as it is stored.
struct StaircaseState {
  const std::int64_t* row;

  ATTNX_LAYOUT_INLINE std::int64_t length() const { return row[0]; }
  ATTNX_LAYOUT_INLINE std::int64_t tail() const { return row[1]; }
  ATTNX_LAYOUT_INLINE std::int64_t newest(int plane) const { return row[2 * plane]; }
  ATTNX_LAYOUT_INLINE std::int64_t refined(int plane) const { return row[2 * plane + 1]; }

  // It returns the slot of a window in a plane, or -1 where the plane does not hold it.
  ATTNX_LAYOUT_INLINE std::int64_t slot(const StaircaseLayout& layout, int plane, std::int64_t window) const {
    if (plane == 0) return window;
    const std::int64_t age = layout.windows_of(length()) - window;  // 1 for the newest
    if (age > refined(plane)) return -1;
    const std::int64_t slots = layout.plane[plane].slots;
    return (newest(plane) - (age - 1) + slots) % slots;
  }
};

// The memory of a cache is contiguous: [batch][heads][2 matrices][...] but for the state.
struct Staircase {
  StaircaseLayout layout;
  std::int64_t heads = 0;
  std::int64_t* state = nullptr;    // [batch][state_size]
  std::uint32_t* codes = nullptr;   // [words]
  std::uint16_t* ranges = nullptr;  // [matrix_ranges][2]
  void* tail = nullptr;             // [kTailSlots][tail_tokens][head_dim] in the dtype of the call

  ATTNX_LAYOUT_INLINE StaircaseState of(std::int64_t batch) const { return {state + batch * layout.state_size()}; }
  ATTNX_LAYOUT_INLINE std::int64_t matrix(std::int64_t batch, std::int64_t head, int which) const {
    return (batch * heads + head) * 2 + which;
  }
  ATTNX_LAYOUT_INLINE std::uint32_t* codes_of(std::int64_t batch, std::int64_t head, int which) const {
    return codes + matrix(batch, head, which) * layout.words;
  }
  ATTNX_LAYOUT_INLINE std::uint16_t* ranges_of(std::int64_t batch, std::int64_t head, int which) const {
    return ranges + matrix(batch, head, which) * layout.matrix_ranges() * 2;
  }
  template <class T>
  ATTNX_LAYOUT_INLINE T* tail_of(std::int64_t batch, std::int64_t head, int which, std::int64_t slot) const {
    return static_cast<T*>(tail) + matrix(batch, head, which) * layout.matrix_tail() + slot * layout.tail_slot();
  }
};

}  // namespace attnx
