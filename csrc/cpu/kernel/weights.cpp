// Compiled once per instruction set; picks the types.
#include "cpu/kernel/scores.h"
#include "dtype.h"
#include "weights/by_key.h"
#include "weights/by_row.h"
#include "weights/chosen_keys.h"
#include "weights/softplus_rows.h"

namespace attnx::cpu::ATTNX_ISA {

namespace {

// Calls use(kernel) with the kernel of the call's dtype and score.
template <template <class, class> class Kernel, class Params, class Use>
auto with_weights(const Params& p, const Executor& executor, const Use& use) {
  return with_input(p.dtype, [&]<class Input>() {
    return with_backward_score(p.score, [&]<class Score>() { return use(Kernel<Input, Score>(p, executor)); });
  });
}

template <class Input, class Score>
using RowWeightsKernel = ByRow<Input, RowWeights<Input, Score>>;
template <class Input, class>
using MaxLogitsKernel = ByRow<Input, MaxLogits<Input>>;
template <class Input, class>
using ChosenKeysKernel = ByRow<Input, ChosenKeys<Input>>;
template <class Input>
using SoftplusRowsKernel = ByRow<Input, SoftplusRows<Input>>;

}  // namespace

#define ATTNX_WEIGHTS(name, Params, Kernel)                                                                   \
  std::size_t name##_workspace(const Params& p, const Executor& executor) {                                   \
    return with_weights<Kernel>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); }); \
  }                                                                                                           \
  void name(const Params& p, const Executor& executor, char* workspace) {                                     \
    with_weights<Kernel>(p, executor, [&](const auto& f) { f.run(workspace); });                              \
  }
ATTNX_WEIGHTS(key_weights, KeyWeightsParams, KeyWeights)
ATTNX_WEIGHTS(row_weights, RowWeightsParams, RowWeightsKernel)
ATTNX_WEIGHTS(max_logits, MaxLogitsParams, MaxLogitsKernel)
ATTNX_WEIGHTS(chosen_keys, ChosenKeysParams, ChosenKeysKernel)
#undef ATTNX_WEIGHTS

std::size_t softplus_rows_workspace(const SoftplusRowsParams& p, const Executor& executor) {
  return with_kernel<SoftplusRowsKernel>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}
void softplus_rows(const SoftplusRowsParams& p, const Executor& executor, char* workspace) {
  with_kernel<SoftplusRowsKernel>(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA
