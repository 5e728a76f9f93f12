#include "sigmoid_weights.h"

#include <type_traits>

#include "cuda/common/device.h"
#include "cuda/common/geometry.h"
#include "cuda/score/sigmoid_formulas.h"

namespace attnx::cuda {

namespace {

struct WeightsArguments {
  const float* logits;
  float* weights;
  std::int64_t n;
};

template <class Input, class Formula>
__global__ void __launch_bounds__(256) attnx_sigmoid_weights(const __grid_constant__ WeightsArguments args) {
  const std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.n) return;
  const float weight = Formula::template weight<Input>(args.logits[i] * -kLog2E);
  args.weights[i] = (weight < 0 ? 0 : weight) * (1 / Formula::template kScale<Input>);  // as pack_nonnegative does
}

}  // namespace

void sigmoid_weights(const float* logits, float* weights, std::int64_t n, DType dtype, bool exact,
                     const Launch& launch) {
  const WeightsArguments args{logits, weights, n};
  const bool half = dtype == DType::kFloat16;
  auto* const kernel =
      exact
          ? (half ? attnx_sigmoid_weights<__half, ExactSigmoid> : attnx_sigmoid_weights<__nv_bfloat16, ExactSigmoid>)
          : (half ? attnx_sigmoid_weights<__half, NewtonSigmoid> : attnx_sigmoid_weights<__nv_bfloat16, NewtonSigmoid>);
  launch_kernel("attnx_sigmoid_weights", kernel, (n + 255) / 256, 256, 0, static_cast<cudaStream_t>(launch.stream),
                args);
}

}  // namespace attnx::cuda
