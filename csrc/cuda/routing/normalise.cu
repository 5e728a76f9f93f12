// This makes the two matrices that scores.cu multiplies, from the tensors of a call. A warp makes a row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "cuda/common/device.h"
#include "cuda/routing/normalised_row.h"
#include "scores.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct RowArguments {
  Tensor rows;
  float* to;
  std::int64_t count, heads, length;  // count: rows of all heads and sequences
  int features, padded;
};

// This reads the row of this warp, changes its numbers, and writes it with zeros behind it; change(x, lane) changes
// those that a lane has.
template <class Input, class Change>
__device__ __forceinline__ void make_row(const RowArguments& args, Change change) {
  const int lane = threadIdx.x % 32;
  const std::int64_t warp = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (warp >= args.count) return;
  const std::int64_t row = warp % args.length, head = warp / args.length % args.heads,
                     batch = warp / args.length / args.heads;
  const Input* from = static_cast<const Input*>(args.rows.data) + batch * args.rows.batch_stride +
                      head * args.rows.head_stride + row * args.rows.row_stride;
  float x[kPerLane];
  load_row(x, from, args.features, lane);
  change(x, lane);
  float* const to = args.to + warp * args.padded;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (lane + i * 32 < args.padded) to[lane + i * 32] = lane + i * 32 < args.features ? x[i] : 0.0f;
}

template <class Input>
__global__ void __launch_bounds__(kThreads) attnx_normalise_rows(const __grid_constant__ RowArguments args) {
  make_row<Input>(args, [&](float (&x)[kPerLane], int lane) { normalise(x, args.features, lane); });
}

__global__ void __launch_bounds__(kThreads) attnx_pad_centroids(const __grid_constant__ RowArguments args) {
  make_row<float>(args, [](float (&)[kPerLane], int) {});
}

using RowKernel = void (*)(RowArguments);

void launch_rows(const char* name, RowKernel kernel, std::int64_t head_dim, RowArguments args, const Launch& launch) {
  if (head_dim > kMaxHeadDim)
    throw std::runtime_error(std::string(name) + ": head_dim: expected at most " + std::to_string(kMaxHeadDim) +
                             ", got " + std::to_string(head_dim));
  args.features = int(head_dim);
  args.padded = int(padded_to_vectors(head_dim));
  launch_kernel(name, kernel, (args.count + kWarps - 1) / kWarps, kThreads, 0, static_cast<cudaStream_t>(launch.stream),
                args);
}

RowKernel normalising_kernel(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return attnx_normalise_rows<float>;
    case DType::kBFloat16: return attnx_normalise_rows<__nv_bfloat16>;
    case DType::kFloat16: return attnx_normalise_rows<__half>;
    default: throw std::runtime_error("normalise_rows: dtype: expected float32, bfloat16 or float16, got float64");
  }
}

}  // namespace

void normalise_rows(const RouteParams& p, float* normalised, const Launch& launch) {
  const std::int64_t heads = p.heads / p.group;
  launch_rows("attnx_normalise_rows", normalising_kernel(p.dtype), p.head_dim,
              {p.rows, normalised, p.batch * heads * p.length, heads, p.length}, launch);
}

void pad_centroids(const RouteParams& p, float* padded, const Launch& launch) {
  const Tensor centroids{const_cast<float*>(p.centroids), 0, p.clusters * p.head_dim, p.head_dim};
  launch_rows("attnx_pad_centroids", attnx_pad_centroids, p.head_dim,
              {centroids, padded, p.heads * p.clusters, p.heads, p.clusters}, launch);
}

}  // namespace attnx::cuda
