// These are the sums over gradients of logits for sm_80 of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/mainloop/sm80/sums.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/mainloop/summands.h"
#include "cuda/reduction/blocks.h"
#include "cuda/storage/strided.h"
#include "cuda/units/sums_call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
struct GradSumsSm80 {
  template <class Reduction, bool kAligned, class Tile>
  static void launch(const GradSumsCall& call, std::int64_t blocks) {
    using Storage = Strided<Input, kAligned>;
    const auto& p = call.params;
    const SumsArguments<RowsOfBackward, Reduction, Storage> args{
        call.geometry, call.scaling, call.rows, {p.query, p.key, p.grad_output, p.value}, Reduction::parameters(p)};
    launch_kernel("attnx_sums_sm80", attnx_sums_sm80<Score, GradLogits, Reduction, Storage, Tile>, blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }

  template <class Reduction, class Tile>
  static void launch(const GradSumsCall& call) {
    const std::int64_t blocks = Reduction::blocks(call.params);
    call.aligned ? launch<Reduction, true, Tile>(call, blocks) : launch<Reduction, false, Tile>(call, blocks);
  }

  static void run(const GradSumsCall& call) {
    using Sizes = SumsTiles<kHeadDim>;
    if (call.params.grad_block_bias) launch<Blocks, typename Sizes::GradBlocks>(call);
  }
};

}  // namespace attnx::cuda
