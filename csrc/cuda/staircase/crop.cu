#include "cuda/common/device.h"
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/staircase/next_state.h"
#include "cuda/staircase/number.h"
#include "cuda/staircase/publish.h"
#include "cuda/staircase/staircase.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256, kTokens = 32;  // of a block

std::int64_t parts_of_tail(const StaircaseLayout& layout) { return ceil_div(layout.tail_tokens(), kTokens); }

// What is left of a window that was quantised becomes the tail: a block writes some tokens of it, of the keys or the
// values of one head.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    attnx_staircase_crop(const __grid_constant__ StaircaseCropParams p, const std::int64_t parts) {
  const StaircaseLayout& layout = p.cache.layout;
  const std::int64_t unit = blockIdx.x / parts, head = unit / 2 % p.cache.heads, batch = unit / 2 / p.cache.heads;
  const int which = int(unit % 2), dim = int(layout.head_dim);
  const StaircaseState before = p.cache.of(batch);
  const NextState next = next_state(p, batch);
  const StaircaseState after = next;
  const std::int64_t windows = layout.windows_of(after.length()), first = windows * layout.window;
  if (layout.windows_of(before.length()) == windows) return;
  const NumbersOfHead<Element> numbers(p.cache, before, batch, head, which);
  Element* const tail = p.cache.tail_of<Element>(batch, head, which, after.tail());
  const std::int64_t begin = blockIdx.x % parts * kTokens, end = min(begin + kTokens, after.length() - first);
  for (std::int64_t i = begin * dim + threadIdx.x; i < end * dim; i += kThreads)
    tail[i] = numbers.at(first + i / dim, int(i % dim));
}

}  // namespace

void staircase_crop(const StaircaseCropParams& p, const Launch& where) {
  const Range range("attnx::staircase_crop");
  const std::int64_t parts = parts_of_tail(p.cache.layout);
  launch_kernel("attnx_staircase_crop",
                p.dtype == DType::kBFloat16 ? attnx_staircase_crop<__nv_bfloat16> : attnx_staircase_crop<__half>,
                p.batch * p.cache.heads * 2 * parts, kThreads, 0, static_cast<cudaStream_t>(where.stream), p, parts);
  publish(p, where);
}

}  // namespace attnx::cuda
