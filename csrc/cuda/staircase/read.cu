#include "cuda/common/device.h"
#include "cuda/dispatch/range.h"
#include "cuda/staircase/number.h"
#include "cuda/staircase/staircase.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256, kTokens = 32;  // of a block

// A block reads some tokens of the keys or of the values of one head.
template <class Element>
__global__ void __launch_bounds__(kThreads) attnx_staircase_read(const __grid_constant__ StaircaseReadParams p) {
  const std::int64_t parts = (p.count + kTokens - 1) / kTokens, unit = blockIdx.x / parts;
  const int which = int(unit % 2), dim = int(p.cache.layout.head_dim);
  const std::int64_t head = unit / 2 % p.cache.heads, batch = unit / 2 / p.cache.heads;
  const StaircaseState state = p.cache.of(batch);
  const NumbersOfHead<Element> numbers(p.cache, state, batch, head, which);
  const Tensor& to = which == kKeyMatrix ? p.key : p.value;
  Element* const rows = static_cast<Element*>(to.data) + batch * to.batch_stride + head * to.head_stride;
  const std::int64_t begin = blockIdx.x % parts * kTokens, left = state.length() - p.first;
  const std::int64_t end = min(min(begin + kTokens, p.count), left);
  for (std::int64_t i = begin * dim + threadIdx.x; i < end * dim; i += kThreads)
    rows[i / dim * to.row_stride + i % dim] = numbers.at(p.first + i / dim, int(i % dim));
}

}  // namespace

void staircase_read(const StaircaseReadParams& p, const Launch& where) {
  const Range range("attnx::staircase_dequantize");
  const std::int64_t blocks = p.batch * p.cache.heads * 2 * ((p.count + kTokens - 1) / kTokens);
  launch_kernel("attnx_staircase_read",
                p.dtype == DType::kBFloat16 ? attnx_staircase_read<__nv_bfloat16> : attnx_staircase_read<__half>,
                blocks, kThreads, 0, static_cast<cudaStream_t>(where.stream), p);
}

}  // namespace attnx::cuda
