// Feature maps of linear attention, on rows in place, and their derivatives.
#pragma once

#include "../math.h"
#include "attnx/params.h"

namespace attnx::cpu::ATTNX_ISA {

// x[dim] becomes phi(x); beyond dim, up to a whole vector, it becomes 0.
template <class Sum>
inline void map_features(FeatureMap map, Sum* x, std::int64_t dim) {
  const std::int64_t padded = round_up(dim, kLanes<Sum>);
  if (map == FeatureMap::kSoftmax) {
    Sum highest = x[0], sum = 0;
    for (std::int64_t d = 1; d < dim; ++d) highest = larger(highest, x[d]);
    for (std::int64_t d = 0; d < padded; d += kLanes<Sum>) store(x + d, exp(load(x + d) - highest));
    for (std::int64_t d = 0; d < dim; ++d) sum += x[d];
    const Sum factor = 1 / sum;
    for (std::int64_t d = 0; d < dim; ++d) x[d] *= factor;
  } else {
    for (std::int64_t d = 0; d < padded; d += kLanes<Sum>) {
      const Vec<Sum> v = load(x + d);
      if (map == FeatureMap::kElu) {
        store(x + d, v > 0 ? v + Sum(1) : exp(v > 0 ? Vec<Sum>{} : v));
      } else {
        store(x + d, v < 0 ? Vec<Sum>{} : v);  // a NaN stays
      }
    }
  }
  for (std::int64_t d = dim; d < padded; ++d) x[d] = 0;
}

// grad[dim] by phi(x) becomes grad by x. All three derivatives follow from phi alone.
template <class Sum>
inline void differentiate_features(FeatureMap map, const Sum* phi, Sum* grad, std::int64_t dim) {
  switch (map) {
    case FeatureMap::kSoftmax: {
      Sum dot = 0;
      for (std::int64_t d = 0; d < dim; ++d) dot += phi[d] * grad[d];
      for (std::int64_t d = 0; d < dim; ++d) grad[d] = phi[d] * (grad[d] - dot);
      break;
    }
    case FeatureMap::kElu:  // e^x = phi where x < 0
      for (std::int64_t d = 0; d < dim; ++d) grad[d] *= smaller(phi[d], Sum(1));
      break;
    case FeatureMap::kRelu:
      for (std::int64_t d = 0; d < dim; ++d) grad[d] = phi[d] > 0 ? grad[d] : 0;
  }
}

}  // namespace attnx::cpu::ATTNX_ISA
