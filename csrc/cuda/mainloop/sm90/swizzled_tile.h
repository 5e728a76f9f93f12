// These are tiles of 16-bit rows in shared memory as TMA writes them and wgmma reads them, with 128-byte swizzle (PTX
// ISA 9.0, sections 5.5.6 and 9.7.15.5).
#pragma once

#include "cuda/common/ptx_sm90.h"

namespace attnx::cuda {

// A tile has kRows rows of kFeatures elements, as panels of 64 features: a row of a panel is 128 bytes, whose chunks of
// 16 bytes are swizzled, chunk ^ row % 8. A tile is aligned to 1024 bytes. As an operand of wgmma its rows are those of
// m or n ("by rows"), or those of k ("transposed"); no data moves for either.
template <int kRows_, int kFeatures_>
struct SwizzledTile {
  static constexpr int kRows = kRows_, kFeatures = kFeatures_;
  static constexpr int kPanelFeatures = 64, kPanels = kFeatures / kPanelFeatures, kPanelBytes = kRows * 128;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static constexpr int kChunks = kFeatures / 8, kLanes = 8;  // of 16 bytes in a row; threads that store a row together
  static_assert(kRows % 8 == 0 && kFeatures % kPanelFeatures == 0);

  static __device__ __forceinline__ int offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
  }

  // wgmma's matrix descriptors hold the address, two strides in units of 16 bytes, and the swizzle. By rows, groups of
  // 8 rows are 1024 bytes apart; transposed, groups of 8 k are, and panels of 64 columns are kPanelBytes apart.
  static __device__ __forceinline__ std::uint64_t by_rows(std::uint32_t tile) { return describe(tile, 16); }
  static __device__ __forceinline__ std::uint64_t transposed(std::uint32_t tile) { return describe(tile, kPanelBytes); }

  // This is added to a descriptor for the elements from `row` and `feature` on. Rows are multiples of 8; features are
  // multiples of 16 by rows, and of 64 transposed.
  static __device__ __forceinline__ constexpr std::uint64_t step(int row, int feature) {
    return (feature / kPanelFeatures * kPanelBytes + row * 128 + feature % kPanelFeatures * 2) >> 4;
  }

  // TMA loads all panels of a tile, from this place in the tensor on. `at` begins with the feature 0.
  static __device__ __forceinline__ void load(std::uint32_t tile, const CUtensorMap& from, int (&at)[5],
                                              std::uint32_t barrier, std::uint64_t cache_policy) {
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      at[0] = p * kPanelFeatures;
      load_box(tile + p * kPanelBytes, from, at, barrier, cache_policy);
    }
  }

 private:
  static __device__ __forceinline__ std::uint64_t describe(std::uint32_t tile, int stride) {
    constexpr std::uint64_t kSwizzle128 = std::uint64_t(1) << 62, kGroup = std::uint64_t(1024 >> 4) << 32;
    return kSwizzle128 | kGroup | std::uint64_t(stride >> 4) << 16 | (tile & 0x3ffff) >> 4;
  }
};

}  // namespace attnx::cuda
