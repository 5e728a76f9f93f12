// CUB's radix sort is stable, so that the items of a list stay in their order.
#include "sorted_lists.h"

#include <cub/device/device_radix_sort.cuh>
#include <stdexcept>
#include <string>

#include "cuda/common/device.h"
#include "cuda/routing/routing.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256;

std::int64_t blocks_of(std::int64_t n) { return (n + kThreads - 1) / kThreads; }

}  // namespace

// A key is the list's number among those of all heads, each of which has one more list, for what is in none.
__global__ void __launch_bounds__(kThreads)
    attnx_list_keys(const __grid_constant__ SortedLists args, std::uint32_t* keys, std::int32_t* items) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= args.heads * args.length) return;
  const std::int64_t head = n / args.length, item = n % args.length;
  const bool is_used = !args.used || item < args.used[head * args.used_stride];
  const int list = is_used ? args.list_of[n] : -1;
  keys[n] = std::uint32_t(head * (args.lists + 1) + (list < 0 ? args.lists : list));
  items[n] = std::int32_t(item);
}

__global__ void __launch_bounds__(kThreads)
    attnx_list_items(const __grid_constant__ SortedLists args, const std::uint32_t* keys, const std::int32_t* items) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= args.heads * args.length) return;
  const std::int64_t head = n / args.length;
  args.items[n] = keys[n] < std::uint32_t(head * (args.lists + 1) + args.lists) ? items[n] : 0;
}

// A thread finds where a list starts among the sorted keys of its head.
__global__ void __launch_bounds__(kThreads)
    attnx_list_offsets(const __grid_constant__ SortedLists args, const std::uint32_t* keys) {
  const std::int64_t n = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= args.heads * (args.lists + 1)) return;
  const std::int64_t head = n / (args.lists + 1);
  const std::uint32_t* of_head = keys + head * args.length;
  std::int64_t low = 0, high = args.length;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (of_head[middle] < std::uint32_t(n)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  args.offsets[n] = std::int32_t(low);
}

namespace {

struct SortMemory {
  std::uint32_t* keys[2];
  std::int32_t* items[2];
  char* sort;
  std::size_t sort_bytes = 0, bytes;
  int bits = 1;

  SortMemory(const SortedLists& p, void* workspace) {
    const std::int64_t n = p.heads * p.length, keys_of_all = p.heads * (p.lists + 1);
    if (n > INT32_MAX || keys_of_all > UINT32_MAX)
      throw std::runtime_error("sort_into_lists: expected at most 2^31 - 1 rows of all heads, got " +
                               std::to_string(n > INT32_MAX ? n : keys_of_all));
    while (keys_of_all >> bits) ++bits;
    WorkspaceLayout layout;
    for (int i = 0; i < 2; ++i) {
      keys[i] = layout.place<std::uint32_t>(workspace, n);
      items[i] = layout.place<std::int32_t>(workspace, n);
    }
    sort_pairs(p, nullptr, nullptr);
    sort = layout.place<char>(workspace, std::int64_t(sort_bytes));
    bytes = layout.bytes();
  }

  // It leaves the sorted arrays in keys[0] and items[0]. Without memory it asks how much is needed.
  void sort_pairs(const SortedLists& p, void* memory, cudaStream_t stream) {
    cub::DoubleBuffer<std::uint32_t> key_buffers(keys[0], keys[1]);
    cub::DoubleBuffer<std::int32_t> item_buffers(items[0], items[1]);
    check(cub::DeviceRadixSort::SortPairs(memory, sort_bytes, key_buffers, item_buffers, int(p.heads * p.length), 0,
                                          bits, stream),
          "cub::DeviceRadixSort");
    keys[0] = key_buffers.Current();
    items[0] = item_buffers.Current();
  }
};

}  // namespace

std::size_t sort_into_lists_workspace(const SortedLists& p) { return SortMemory(p, nullptr).bytes; }

void sort_into_lists(const SortedLists& p, void* workspace, void* launch_stream) {
  const auto stream = static_cast<cudaStream_t>(launch_stream);
  SortMemory memory(p, workspace);
  const std::int64_t n = p.heads * p.length;
  launch_kernel("attnx_list_keys", attnx_list_keys, blocks_of(n), kThreads, 0, stream, p, memory.keys[0],
                memory.items[0]);
  if (n > 0) memory.sort_pairs(p, memory.sort, stream);
  const std::uint32_t* keys = memory.keys[0];
  const std::int32_t* items = memory.items[0];
  launch_kernel("attnx_list_items", attnx_list_items, blocks_of(n), kThreads, 0, stream, p, keys, items);
  launch_kernel("attnx_list_offsets", attnx_list_offsets, blocks_of(p.heads * (p.lists + 1)), kThreads, 0, stream, p,
                keys);
}

namespace {

SortedLists lists_of(const SortByClusterParams& p) {
  return {p.heads, p.length, p.clusters, p.nearest, nullptr, 0, p.indices, p.offsets};
}

}  // namespace

std::size_t sort_by_cluster_workspace(const SortByClusterParams& p, const Launch&) {
  return sort_into_lists_workspace(lists_of(p));
}

void sort_by_cluster(const SortByClusterParams& p, const Launch& launch) {
  sort_into_lists(lists_of(p), launch.workspace, launch.stream);
}

}  // namespace attnx::cuda
