// These are the sums over keys for sm_80 that sharpened rows need before a forward and before a backward, of one dtype
// and padded head dimension.
#pragma once

#include <algorithm>

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/mainloop/sm80/sums.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/mainloop/summands.h"
#include "cuda/reduction/sharpened_sums.h"
#include "cuda/reduction/softplus_rows.h"
#include "cuda/storage/strided_either.h"
#include "cuda/units/sums_call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
class SoftplusRowsSm80 {
  using Sizes = SumsTiles<kHeadDim>;

  template <class Summand, class Reduction, class Tile>
  static void launch(const SoftplusRowsCall& call, const typename Summand::template Rows<Score>& rows,
                     const typename StridedEither<Input>::SumsTensors& tensors,
                     const typename Reduction::Parameters& reduction) {
    using Storage = StridedEither<Input>;
    const SumsArguments<typename Summand::template Rows<Score>, Reduction, Storage, Plain> args{
        call.geometry, call.scaling, rows, tensors, reduction};
    launch_kernel("attnx_sums_sm80", attnx_sums_sm80<Score, Summand, Reduction, Storage, Tile, Plain>,
                  std::int64_t(reduction.row_blocks.divisor()) * args.batch * args.heads_q, Tile::kThreads,
                  Tile::kSharedBytes, call.stream, args);
  }
  static Divisor row_blocks(const AttentionParams& p, int rows) {
    return Divisor(std::max<std::int64_t>((p.length_q + rows - 1) / rows, 1));
  }

 public:
  static void run(const SoftplusRowsCall& call) {
    if (call.backward) {
      using Tile = typename Sizes::GradRows;
      const BackwardParams& p = *call.backward;
      launch<SharpenedProducts, SharpenedSums, Tile>(call, call.rows, {p.query, p.key, p.grad_output, p.value},
                                                     {row_blocks(p, Tile::kM)});
    } else {
      using Tile = typename Sizes::Rows;
      const SoftplusRowsParams& p = *call.forward;
      launch<Logits, SoftplusRows, Tile>(call, {}, {p.query, p.key, {}, {}},
                                         {row_blocks(p, Tile::kM), p.sharpening.gain, p.sharpening.shift});
    }
  }
};

}  // namespace attnx::cuda
