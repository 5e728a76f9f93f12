#include "cuda/sm80/combine.h"

#include "cuda/launch/element.h"
#include "cuda/launch/launch.h"

namespace attnx::cuda {

void launch_combine(const ForwardArguments& args, int padded_rows, int features, cudaStream_t stream) {
  const CombineArguments combine{args, padded_rows, features};
  const auto& call = args.call;
  constexpr int kThreads = 128, kRows = kThreads / 32;
  const std::int64_t rows = call.batch * args.heads.divisor() * padded_rows;
  const auto launch = [&](const void* kernel) {
    launch_kernel("attnx_combine_sm80", kernel, (rows + kRows - 1) / kRows, kThreads, 0, stream, combine);
  };
  const bool softmax = call.score == Score::kSoftmax;
  if (call.dtype == DType::kBFloat16) {
    launch(softmax ? reinterpret_cast<const void*>(attnx_combine_sm80<__nv_bfloat16, true>)
                   : reinterpret_cast<const void*>(attnx_combine_sm80<__nv_bfloat16, false>));
  } else {
    launch(softmax ? reinterpret_cast<const void*>(attnx_combine_sm80<__half, true>)
                   : reinterpret_cast<const void*>(attnx_combine_sm80<__half, false>));
  }
}

}  // namespace attnx::cuda
