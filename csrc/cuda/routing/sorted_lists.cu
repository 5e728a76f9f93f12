#include "sorted_lists.h"

#include <bit>
#include <stdexcept>
#include <string>

#include "cuda/common/device.h"
#include "cuda/routing/routing.h"
#include "cuda/routing/sorted_pairs.h"

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

SortedPairs pairs_of(const SortedLists& p, WorkspaceLayout& layout, void* workspace) {
  const std::int64_t keys = p.heads * (p.lists + 1);
  if (keys > UINT32_MAX)
    throw std::runtime_error("sort_into_lists: expected at most 2^32 - 1 lists of all heads, got " +
                             std::to_string(keys));
  return {p.heads * p.length, int(std::bit_width(std::uint64_t(keys))), layout, workspace};
}

}  // namespace

std::size_t sort_into_lists_workspace(const SortedLists& p) {
  WorkspaceLayout layout;
  pairs_of(p, layout, nullptr);
  return layout.bytes();
}

void sort_into_lists(const SortedLists& p, void* workspace, void* launch_stream) {
  const auto stream = static_cast<cudaStream_t>(launch_stream);
  WorkspaceLayout layout;
  const SortedPairs pairs = pairs_of(p, layout, workspace);
  const std::int64_t n = pairs.count;
  launch_kernel("attnx_list_keys", attnx_list_keys, blocks_of(n), kThreads, 0, stream, p, pairs.keys[0],
                pairs.items[0]);
  const auto [keys, items] = pairs.sort(stream);
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
