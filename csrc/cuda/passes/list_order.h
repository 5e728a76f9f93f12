// This pass before a deterministic backward over lists counts the order in which tiles of keys add to a tile of rows.
#pragma once

#include <cuda_runtime_api.h>

#include "attnx/params.h"

namespace attnx::cuda {

struct ListOrderArguments {
  BlockList key_blocks, query_blocks;
  int batch, heads;  // that have lists of their own: 1 where one list serves all
  int block_rows;    // blocks of keys
  int* order;        // Listed::BackwardParameters::order
};

void launch_list_order(const ListOrderArguments& args, cudaStream_t stream);

}  // namespace attnx::cuda
