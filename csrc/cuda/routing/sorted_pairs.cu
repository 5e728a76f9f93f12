// CUB sorts by radix, which is stable.
#include "sorted_pairs.h"

#include <cub/device/device_radix_sort.cuh>
#include <stdexcept>
#include <string>

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

// Without scratch memory this sets how much is needed.
SortedPairs::Result sort_pairs(const SortedPairs& p, void* scratch, std::size_t& scratch_bytes, cudaStream_t stream) {
  cub::DoubleBuffer<std::uint32_t> keys(p.keys[0], p.keys[1]);
  cub::DoubleBuffer<std::int32_t> items(p.items[0], p.items[1]);
  check(cub::DeviceRadixSort::SortPairs(scratch, scratch_bytes, keys, items, int(p.count), 0, p.bits, stream),
        "cub::DeviceRadixSort");
  return {keys.Current(), items.Current()};
}

}  // namespace

SortedPairs::SortedPairs(std::int64_t count_, int bits_, WorkspaceLayout& layout, void* workspace)
    : count(count_), bits(bits_) {
  if (count > INT32_MAX)
    throw std::runtime_error("SortedPairs: expected at most 2^31 - 1 pairs, got " + std::to_string(count));
  for (int i = 0; i < 2; ++i) {
    keys[i] = layout.place<std::uint32_t>(workspace, count);
    items[i] = layout.place<std::int32_t>(workspace, count);
  }
  sort_pairs(*this, nullptr, scratch_bytes, nullptr);
  scratch = layout.place<char>(workspace, std::int64_t(scratch_bytes));
}

SortedPairs::Result SortedPairs::sort(cudaStream_t stream) const {
  if (count == 0) return {keys[0], items[0]};
  std::size_t bytes = scratch_bytes;
  return sort_pairs(*this, scratch, bytes, stream);
}

}  // namespace attnx::cuda
