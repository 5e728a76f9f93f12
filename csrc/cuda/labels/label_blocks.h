// This labels the blocks of keys of each row of blocks by their products.
#pragma once

#include "attnx/block_params.h"
#include "cuda/common/launch.h"

namespace attnx::cuda {

inline std::size_t label_blocks_workspace(const LabelBlocksParams&, const Launch&) { return 0; }
void label_blocks(const LabelBlocksParams& params, const Launch& launch);

struct LabelArguments {
  BlockGrid grid;  // of the longest sequences
  SequenceLengths lengths;
  std::int64_t first_head, heads;  // those of the launch, counted over the batch
  std::int64_t heads_of_sequence;
  const float* products;  // [heads, query blocks, row_stride]
  std::int64_t row_stride;
  BlockShares shares;
  std::int8_t* labels;  // [heads, query blocks, key blocks]
};
void launch_label_blocks(const LabelArguments& args, const Launch& launch);

}  // namespace attnx::cuda
