// These are the sums over gradients of logits for sm_80 of one score, dtype and padded head dimension.
#pragma once

#include "cuda/common/device.h"
#include "cuda/logits/plain.h"
#include "cuda/logits/with_terms.h"
#include "cuda/mainloop/sm80/sums.h"
#include "cuda/mainloop/sm80/tables_tile_sizes.h"
#include "cuda/mainloop/summands.h"
#include "cuda/reduction/blocks.h"
#include "cuda/reduction/table_rows.h"
#include "cuda/reduction/term_numbers.h"
#include "cuda/storage/strided_either.h"
#include "cuda/units/sums_call.h"

namespace attnx::cuda {

template <class Score, class Input, int kHeadDim>
class GradSumsSm80 {
  using Sizes = SumsTiles<kHeadDim>;
  static_assert(Sizes::GradTerms::kM == grad_terms_rows(kHeadDim) && Sizes::GradTerms::kN == kGradTermsKeys);
  template <class Logits>
  using TileOf = std::conditional_t<std::is_same_v<Logits, WithTables>, typename TablesSumsTile<kHeadDim>::Tile,
                                    typename Sizes::GradTerms>;

  template <class Summand, class Reduction, class Storage, class Tile, class Logits>
  static void launch(const GradSumsCall& call, const typename Logits::Arguments& logits,
                     const typename Summand::template Rows<Score>& rows,
                     const typename Reduction::Parameters& reduction, std::int64_t blocks) {
    const auto& p = call.params;
    const SumsArguments<typename Summand::template Rows<Score>, Reduction, Storage, Logits> args{
        call.geometry, logits, rows, {p.query, p.key, p.grad_output, p.value}, reduction};
    launch_kernel("attnx_sums_sm80", attnx_sums_sm80<Score, Summand, Reduction, Storage, Tile, Logits>, blocks,
                  Tile::kThreads, Tile::kSharedBytes, call.stream, args);
  }

  static void launch_blocks(const GradSumsCall& call) {
    launch<GradLogits, Blocks, StridedEither<Input>, typename Sizes::GradBlocks, Plain>(
        call, call.scaling, call.rows, Blocks::parameters(call.params), Blocks::blocks(call.params));
  }

  template <class Logits>
  static void launch_terms(const GradSumsCall& call, const typename Logits::Arguments& logits, bool of_factors,
                           const TermNumbers::Parameters& numbers) {
    using Tile = TileOf<Logits>;
    launch<GradTerms, TermNumbers, StridedEither<Input>, Tile, Logits>(call, logits, {call.rows, of_factors}, numbers,
                                                                       numbers.owners);
  }

  static void launch_table(const GradSumsCall& call, const WithTables::Arguments& logits, const Tensor& sums,
                           bool of_keys) {
    if (!sums.data) return;
    using Tile = TileOf<WithTables>;
    const auto& p = call.params;
    const std::int64_t tiles =
        of_keys ? (p.length_k + Tile::kN - 1) / Tile::kN : (p.length_q + Tile::kM - 1) / Tile::kM;
    launch<GradTerms, TableRows, StridedEither<Input>, Tile, WithTables>(
        call, logits, {call.rows, false}, {Divisor(std::max<std::int64_t>(tiles, 1)), of_keys, p.terms.tables, sums},
        p.batch * p.heads_q * tiles);
  }

  template <class Logits>
  static void run_with(const GradSumsCall& call) {
    using Tile = TileOf<Logits>;
    const auto& p = call.params;
    typename Logits::Arguments logits = Logits::arguments(call.scaling, p);
    if constexpr (std::is_same_v<Logits, WithTables>) {
      launch_table(call, logits, p.grad_query_table, false);
      launch_table(call, logits, p.grad_key_table, true);
    }
    if (p.grad_block_bias) launch_terms<Logits>(call, logits, false, TermNumbers::by_block(p));
    if (has_gradient_of_pairs(p)) launch_terms<Logits>(call, logits, false, TermNumbers::of_mask<Tile>(p));
    if (call.distance_sums)
      launch_terms<Logits>(call, logits, false, TermNumbers::by_distance<Tile>(p, call.distance_sums));
    // The pass that adds up sums by key multiplies with key_mask what is not the gradient of key_mask.
    logits.terms.key_mask = {};
    const auto by_key = [&](float* sums, bool of_factors) {
      launch_terms<Logits>(call, logits, of_factors, TermNumbers::by_key<Tile>(p, sums));
    };
    if (call.added_sums) by_key(call.added_sums, false);
    if (call.factor_sums && call.factor_sums != call.added_sums) by_key(call.factor_sums, true);
  }

 public:
  static void run(const GradSumsCall& call) {
    const auto& p = call.params;
    if constexpr (Score::kNormalised)
      if (p.terms.tables.index) return run_with<WithTables>(call);
    if (has_terms(p)) return run_with<WithTerms>(call);
    if (p.grad_block_bias) launch_blocks(call);
  }
};

}  // namespace attnx::cuda
