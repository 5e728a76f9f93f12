// This sorts the items of each head into lists, in their order: rows by cluster or, for the inverse, slots of clusters
// by row.
#pragma once

#include <cstdint>

#include "cuda/common/launch.h"
#include "cuda/dispatch/workspace.h"

namespace attnx::cuda {

struct SortedLists {
  std::int64_t heads = 0, length = 0, lists = 0;
  const std::int32_t* list_of = nullptr;  // [heads, length]; -1: none
  // Where it is not null, only the first used[head * used_stride] items of a head are in lists.
  const std::int32_t* used = nullptr;
  std::int64_t used_stride = 0;
  std::int32_t* items = nullptr;    // [heads, length], by list; what is in none comes last, as 0
  std::int32_t* offsets = nullptr;  // [heads, lists + 1]
};

std::size_t sort_into_lists_workspace(const SortedLists& params);
void sort_into_lists(const SortedLists& params, void* workspace, void* stream);

}  // namespace attnx::cuda
