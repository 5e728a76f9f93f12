// These sums belong to no kernel.
#include "attention.h"

namespace attnx::cpu {

void sum_over_batch(const SumOverBatchParams& p, const Executor&) {
  for (std::int64_t h = 0; h < p.heads; ++h) {
    double sum = 0;
    for (std::int64_t b = 0; b < p.batch; ++b) sum += p.from[b * p.heads + h];
    if (p.dtype == DType::kFloat64) {
      static_cast<double*>(p.to)[h] = sum;
    } else {
      static_cast<float*>(p.to)[h] = float(sum);
    }
  }
}

}  // namespace attnx::cpu
