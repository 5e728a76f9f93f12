// These are the sums over weights and logits for sm_80 of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/logits/with_terms.h"
#include "cuda/mainloop/sm80/sums.h"
#include "cuda/mainloop/sm80/tile_sizes.h"
#include "cuda/mainloop/summands.h"
#include "cuda/reduction/chosen_keys.h"
#include "cuda/reduction/keys.h"
#include "cuda/reduction/largest.h"
#include "cuda/reduction/pairs.h"
#include "cuda/storage/strided_either.h"
#include "cuda/units/sums_call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
class SumsSm80 {
  using Sizes = SumsTiles<kHeadDim>;

  // There is one tile at least, as nothing divides by 0; it may be empty.
  static std::int64_t tiles(std::int64_t rows, int size) { return rows > 0 ? (rows + size - 1) / size : 1; }

  template <class Summand, class Reduction, bool kAligned, class Tile>
  static void launch(const SumsCall& call, const WeightsParams& p, const typename Summand::template Rows<Score>& rows,
                     const typename Reduction::Parameters& reduction, std::int64_t blocks) {
    using Storage = Strided<Input, kAligned>;
    const SumsArguments<typename Summand::template Rows<Score>, Reduction, Storage, Plain> args{
        call.geometry, call.scaling, rows, {p.query, p.key, {}, {}}, reduction};
    launch_kernel("attnx_sums_sm80", attnx_sums_sm80<Score, Summand, Reduction, Storage, Tile, Plain>, blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }

  template <class Summand, class Reduction, class Tile>
  static void launch(const SumsCall& call, const WeightsParams& p, const typename Summand::template Rows<Score>& rows,
                     const typename Reduction::Parameters& reduction, std::int64_t blocks) {
    blocks *= p.batch * p.heads_q;
    call.aligned ? launch<Summand, Reduction, true, Tile>(call, p, rows, reduction, blocks)
                 : launch<Summand, Reduction, false, Tile>(call, p, rows, reduction, blocks);
  }

  static void launch_chosen_keys(const SumsCall& call, const ChosenKeysParams& p) {
    using Tile = typename Sizes::Rows;
    using Storage = StridedEither<Input>;
    const std::int64_t rows = tiles(p.length_q, Tile::kM);
    const ChosenKeys::Parameters reduction{Divisor(rows), static_cast<std::int64_t*>(p.result), float(p.temperature),
                                           p.seed, p.offset};
    const SumsArguments<PlainRows, ChosenKeys, Storage, WithTerms> args{
        call.geometry, WithTerms::arguments(call.scaling, p), {}, {p.query, p.key, {}, {}}, reduction};
    launch_kernel("attnx_sums_sm80", attnx_sums_sm80<Score, Logits, ChosenKeys, Storage, Tile, WithTerms>,
                  rows * p.batch * p.heads_q, Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }

  static RowsOfWeights<Score> rows_of(const WeightsParams& p, const PerRow& counts) {
    return {p.logsumexp, counts, Score::parameters(p)};
  }

 public:
  static void run(const SumsCall& call) {
    if (call.key_weights) {
      const KeyWeightsParams& p = *call.key_weights;
      using Tile = typename Sizes::Keys;
      const std::int64_t keys = tiles(p.length_k, Tile::kN);
      launch<Weights, Keys, Tile>(call, p, rows_of(p, p.row_weights), {Divisor(keys), static_cast<float*>(p.result)},
                                  keys);
    } else if (call.row_weights) {
      const RowWeightsParams& p = *call.row_weights;
      using Tile = typename Sizes::Pairs;
      const std::int64_t rows = tiles(p.length_q, Tile::kM), keys = tiles(p.length_k, Tile::kN);
      launch<Weights, Pairs, Tile>(call, p, rows_of(p, {}),
                                   {Divisor(rows), Divisor(keys), static_cast<float*>(p.result)}, rows * keys);
    } else if constexpr (Score::kNormalised) {  // logits are those of any score
      if constexpr (kHeadDim >= kChosenKeysHeadDims[0])
        if (call.chosen_keys) return launch_chosen_keys(call, *call.chosen_keys);
      const MaxLogitsParams& p = *call.max_logits;
      using Tile = typename Sizes::Rows;
      const std::int64_t rows = tiles(p.length_q, Tile::kM);
      launch<Logits, Largest, Tile>(call, p, {}, {Divisor(rows), static_cast<float*>(p.result)}, rows);
    }
  }
};

}  // namespace attnx::cuda
