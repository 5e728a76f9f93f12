#include <algorithm>

#include "cuda/common/device.h"
#include "cuda/dispatch/range.h"
#include "cuda/dispatch/tiling.h"
#include "cuda/staircase/encode.h"
#include "cuda/staircase/next_state.h"
#include "cuda/staircase/publish.h"
#include "cuda/staircase/staircase.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 256, kTokens = 32;  // of a block's turn

struct AppendArguments {
  StaircaseAppendParams params;
  // These count the blocks of the keys, or the values, of one head: some quantise groups of tokens, and others copy
  // rows of the tail.
  std::int64_t groups, tails;
};

template <class Element>
class AppendBlock {
  const StaircaseAppendParams& p_;
  const StaircaseLayout& layout_;
  StaircaseState before_, after_;
  std::int64_t batch_, head_;
  int which_, dim_;
  NumbersOfHead<Element> old_;
  const Element* new_;
  std::int64_t new_stride_;

  __device__ bool keys() const { return which_ == kKeyMatrix; }
  __device__ Element token(std::int64_t t, int channel) const {
    return t < before_.length() ? old_.of_tail(t, channel) : new_[(t - before_.length()) * new_stride_ + channel];
  }

  // This finds the ranges of a group of tokens, [channels] of keys or [groups of channels][tokens] of values.
  __device__ void find_ranges(std::int64_t first, CodeRange* ranges) const {
    const int group = int(layout_.group), lane = threadIdx.x % 32;
    if (keys()) {
      for (int d = threadIdx.x; d < dim_; d += kThreads) {
        float low = INFINITY, high = -INFINITY;
        for (int t = 0; t < group; ++t) {
          const float x = float(token(first + t, d));
          low = fminf(low, x), high = fmaxf(high, x);
        }
        ranges[d] = CodeRange(low, high);
      }
      return;
    }
    for (int i = threadIdx.x / 32; i < dim_; i += kThreads / 32) {
      float low = INFINITY, high = -INFINITY;
      for (int c = lane; c < group; c += 32) {
        const float x = float(token(first + i % group, i / group * group + c));
        low = fminf(low, x), high = fmaxf(high, x);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, step));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
      }
      if (lane == 0) ranges[i] = CodeRange(low, high);
    }
  }

  __device__ void store_ranges(std::int64_t window, int in_window, const CodeRange* ranges) const {
    CodeRange* const to =
        reinterpret_cast<CodeRange*>(p_.cache.ranges_of(batch_, head_, which_)) + window * layout_.window_ranges();
    const int group = int(layout_.group);
    for (int i = threadIdx.x; i < dim_; i += kThreads) {
      const std::int64_t at =
          keys() ? std::int64_t(in_window) / group * dim_ + i : i / group * layout_.window + in_window + i % group;
      to[at] = ranges[i];
    }
  }

  // This stores the codes of 32 tokens in all planes that hold their window.
  __device__ void store_codes(std::int64_t window, int in_window, const std::uint8_t* codes) const {
    std::uint32_t* const all = p_.cache.codes_of(batch_, head_, which_);
    int above = 0;
    for (int plane = 0; plane < layout_.planes; ++plane) {
      const std::int64_t slot = after_.slot(layout_, plane, window);
      if (slot < 0) return;
      const int bits = layout_.plane[plane].bits, block = int(layout_.block_words(plane));
      std::uint32_t* const to = all + layout_.plane[plane].offset + slot * layout_.window_words(plane) +
                                layout_.block_offset(plane, in_window, 0);
      for (int i = threadIdx.x; i < dim_ * bits; i += kThreads)
        to[i] = packed_word(codes + i / block * 32, keys() ? 1 : dim_, keys() ? dim_ : 1, i % block, bits, above);
      above += bits;
    }
  }

 public:
  __device__ AppendBlock(const StaircaseAppendParams& p, const NextState& next, std::int64_t unit)
      : p_(p),
        layout_(p.cache.layout),
        before_(p.cache.of(unit / 2 / p.cache.heads)),
        after_(next),
        batch_(unit / 2 / p.cache.heads),
        head_(unit / 2 % p.cache.heads),
        which_(int(unit % 2)),
        dim_(int(layout_.head_dim)),
        old_(p.cache, before_, batch_, head_, which_) {
    const Tensor& x = keys() ? p.key : p.value;
    new_ = static_cast<const Element*>(x.data) + batch_ * x.batch_stride + head_ * x.head_stride;
    new_stride_ = x.row_stride;
  }

  // This quantises a group of tokens, counted from the first window that the append fills.
  __device__ void encode(std::int64_t number) const {
    __shared__ CodeRange ranges[kMaxHeadDim];
    __shared__ std::uint8_t codes[kTokens * kMaxHeadDim];
    const int group = int(layout_.group), groups = int(layout_.window / group);
    const std::int64_t window = layout_.windows_of(before_.length()) + number / groups;
    if (window >= layout_.windows_of(after_.length())) return;
    const int in_window = int(number % groups) * group;
    const std::int64_t first = window * layout_.window + in_window;
    find_ranges(first, ranges);
    __syncthreads();
    store_ranges(window, in_window, ranges);
    for (int t = 0; t < group; t += kTokens) {
      for (int i = threadIdx.x; i < kTokens * dim_; i += kThreads) {
        const int own = t + i / dim_, d = i % dim_;
        codes[i] = ranges[keys() ? d : d / group * group + own].code(float(token(first + own, d)));
      }
      __syncthreads();
      store_codes(window, in_window + t, codes);
      __syncthreads();
    }
  }

  // This copies rows of the tail. A new tail takes over what stays of the old one.
  __device__ void copy_tail(std::int64_t part) const {
    const std::int64_t first = layout_.windows_of(after_.length()) * layout_.window;
    const std::int64_t begin = (after_.tail() == before_.tail() ? before_.length() : first) + part * kTokens;
    const std::int64_t end = min(begin + kTokens, after_.length());
    Element* const tail = p_.cache.tail_of<Element>(batch_, head_, which_, after_.tail());
    for (std::int64_t i = threadIdx.x; i < (end - begin) * dim_; i += kThreads)
      tail[(begin - first) * dim_ + i] = token(begin + i / dim_, int(i % dim_));
  }
};

template <class Element>
__global__ void __launch_bounds__(kThreads) attnx_staircase_append(const __grid_constant__ AppendArguments args) {
  const std::int64_t blocks = args.groups + args.tails, unit = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const StaircaseAppendParams& p = args.params;
  if (p.most_units >= 0 && unit >= p.most_units) return;
  const NextState next = next_state(p, unit / 2 / p.cache.heads);
  const AppendBlock<Element> own(p, next, unit);
  if (block < args.groups) {
    own.encode(block);
  } else {
    own.copy_tail(block - args.groups);
  }
}

}  // namespace

void staircase_append(const StaircaseAppendParams& p, const Launch& where) {
  const Range range("attnx::staircase_append");
  const StaircaseLayout& layout = p.cache.layout;
  const std::int64_t groups = ceil_div(p.tokens, layout.window) * (layout.window / layout.group);
  const std::int64_t tails = ceil_div(std::min(p.tokens + layout.residual, layout.tail_tokens()), kTokens);
  if (p.tokens == 0) return;
  launch_kernel("attnx_staircase_append",
                p.dtype == DType::kBFloat16 ? attnx_staircase_append<__nv_bfloat16> : attnx_staircase_append<__half>,
                p.batch * p.cache.heads * 2 * (groups + tails), kThreads, 0, static_cast<cudaStream_t>(where.stream),
                AppendArguments{p, groups, tails});
  if (p.most_units < 0) publish(p, where);
}

}  // namespace attnx::cuda
