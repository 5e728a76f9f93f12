// This is softmax whose rows have one more logit, a learned number per head, that takes weight and has no value: the
// attention sink of gpt-oss.
#pragma once

#include <cfloat>

#include "cuda/score/softmax.h"

namespace attnx::cuda {

// This is the score policy. Softmax's backward serves it, as the sink changes nothing there but the logsumexp.
struct SoftmaxSink {
  static constexpr bool kNormalised = true, kBandOnly = false;

  struct Parameters {
    PerHead sink;
  };
  static Parameters parameters(const AttentionParams& p) { return {p.sink}; }

  template <class Input, class Tile, int kRows>
  class Forward : public SoftmaxForward<Input, kRows> {
   public:
    // A row starts from the sink as if that had been its first logit, in the first share of its keys alone.
    __device__ __forceinline__ void set_row(int row, const Parameters& parameters, const Band&, int head, int,
                                            int split) {
      // A sink beyond the largest float is kept finite, so that weights are 0 there and infinities are not subtracted.
      // Without a sink, which a call with terms may lack, a row starts as softmax's does, bit for bit.
      const bool counts = split == 0 && parameters.sink.data;
      const float sink = counts ? fminf(of_head(parameters.sink, head) * kLog2E, FLT_MAX) : -INFINITY;
      const float highest = fmaxf(sink, this->kLowest);
      // One of the four lanes that share the row counts it.
      this->start_row(row, highest, threadIdx.x % 4 == 0 ? exp2_approx(sink - highest) : 0);
    }
  };
};

}  // namespace attnx::cuda
