// This takes the means of ranges of rows, and how far the rows are from them on average.
#include "range_means.h"

#include <bit>
#include <stdexcept>
#include <string>

#include "cuda/common/device.h"
#include "cuda/common/element.h"
#include "cuda/dispatch/tiling.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kVector = 8;  // elements of a lane
constexpr int kMostFeatures = 32 * kVector;

struct RangeArguments {
  RangeMeansParams p;
  int lanes;  // that share a row: a power of 2
};

template <bool kAligned, class Input>
__device__ __forceinline__ void load_vector(float (&x)[kVector], const Input* row, int features) {
  if constexpr (kAligned) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row));
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = float(reinterpret_cast<const Input*>(&bits)[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = i < features ? float(row[i]) : 0.0f;
  }
}

// Each lane leaves in sum what all threads that have its features have together, added up in a fixed order.
__device__ __forceinline__ void add_over_block(float (&sum)[kVector], float (&shared)[kWarps][kMostFeatures],
                                               int lanes) {
  const int lane = threadIdx.x % 32, column = lane % lanes * kVector;
  for (int i = 16; i >= lanes; i /= 2)
#pragma unroll
    for (float& s : sum) s += __shfl_xor_sync(~0u, s, i);
  if (lane < lanes)
#pragma unroll
    for (int i = 0; i < kVector; ++i) shared[threadIdx.x / 32][column + i] = sum[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    sum[i] = 0;
#pragma unroll
    for (const auto& of_warp : shared) sum[i] += of_warp[column + i];
  }
  __syncthreads();  // the next sums go to the same place
}

// A block of threads has a range: each warp reads several rows at a time, and each lane a vector of one.
template <class Input, bool kAligned>
__global__ void __launch_bounds__(kThreads) attnx_range_means(const __grid_constant__ RangeArguments args) {
  __shared__ float shared[kWarps][kMostFeatures];
  const RangeMeansParams& p = args.p;
  const std::int64_t unit = blockIdx.x, range = unit % p.count;
  const std::int64_t head = unit / p.count % p.heads, batch = unit / p.count / p.heads;
  std::int64_t first = range * p.block, last = min(first + p.block, p.length);
  if (p.ranges) {
    const std::int32_t* const pair = p.ranges + batch * p.ranges_batch_stride + 2 * range;
    first = pair[0];
    last = pair[1];
  }
  const int lane = threadIdx.x % 32, column = lane % args.lanes * kVector, features = int(p.dim) - column;
  const int rows_at_once = kThreads / args.lanes, own = int(threadIdx.x) / args.lanes;
  const Input* const rows =
      static_cast<const Input*>(p.rows.data) + batch * p.rows.batch_stride + head * p.rows.head_stride + column;
  const float count = float(max(last - first, std::int64_t(1)));
  const bool writes = int(threadIdx.x) < args.lanes && features > 0;
  float mean[kVector] = {}, x[kVector];
  if (features > 0)
#pragma unroll 4
    for (std::int64_t r = first + own; r < last; r += rows_at_once) {
      load_vector<kAligned>(x, rows + r * p.rows.row_stride, features);
#pragma unroll
      for (int i = 0; i < kVector; ++i) mean[i] += x[i];
    }
  add_over_block(mean, shared, args.lanes);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    mean[i] /= count;
    if (writes && i < features) static_cast<float*>(p.means)[unit * p.dim + column + i] = mean[i];
  }
  if (!p.deviations) return;
  float off[kVector] = {};
  if (features > 0)
#pragma unroll 4
    for (std::int64_t r = first + own; r < last; r += rows_at_once) {
      load_vector<kAligned>(x, rows + r * p.rows.row_stride, features);
#pragma unroll
      for (int i = 0; i < kVector; ++i) off[i] += fabsf(x[i] - mean[i]);
    }
  add_over_block(off, shared, args.lanes);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (writes && i < features) static_cast<float*>(p.deviations)[unit * p.dim + column + i] = off[i] / count;
}

bool vectors_are_aligned(const RangeMeansParams& p) {
  const bool strides = p.rows.batch_stride % kVector == 0 && p.rows.head_stride % kVector == 0;
  return strides && p.rows.row_stride % kVector == 0 && p.dim % kVector == 0 &&
         reinterpret_cast<std::uintptr_t>(p.rows.data) % 16 == 0;
}

}  // namespace

void range_means(const RangeMeansParams& p, const Launch& launch) {
  if (p.dim > kMostFeatures)
    throw std::runtime_error("attnx_range_means: dim: expected at most " + std::to_string(kMostFeatures) + ", got " +
                             std::to_string(p.dim));
  const RangeArguments args{p, int(std::bit_ceil(unsigned(ceil_div(p.dim, kVector))))};
  with_dtype(p.dtype, [&]<DType kDType>() {
    using Input = typename Element<kDType>::Type;
    launch_kernel("attnx_range_means",
                  vectors_are_aligned(p) ? attnx_range_means<Input, true> : attnx_range_means<Input, false>,
                  p.batch * p.heads * p.count, kThreads, 0, static_cast<cudaStream_t>(launch.stream), args);
  });
}

}  // namespace attnx::cuda
