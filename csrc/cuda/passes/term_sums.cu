#include "cuda/passes/term_sums.h"

#include "cuda/common/device.h"
#include "cuda/common/sequence.h"

namespace attnx::cuda {

namespace {

constexpr int kThreads = 128;

// These tell whether sequences, or heads, share the numbers. Packed sequences have keys of their own.
__host__ __device__ bool shares_batch(const TermSumsArguments& args) {
  return args.batch_stride == 0 && !args.cu_seqlens_q;
}
__host__ __device__ bool shares_heads(const TermSumsArguments& args) { return args.head_stride == 0; }

}  // namespace

// A block has some keys of the numbers of a sequence and head.
__global__ void __launch_bounds__(kThreads) attnx_term_sums(const __grid_constant__ TermSumsArguments args) {
  const int heads = shares_heads(args) ? 1 : int(args.heads_q);
  const int key_blocks = int((args.length_k + kThreads - 1) / kThreads);
  const int key = int(blockIdx.x) % key_blocks * kThreads + threadIdx.x;
  const int head = int(blockIdx.x) / key_blocks % heads, batch = int(blockIdx.x) / key_blocks / heads;
  const Sequence sequence = sequence_of(args, batch);
  if (key >= sequence.band.length_k) return;
  const int batch_end = shares_batch(args) ? int(args.batch) : batch + 1;
  const int head_end = shares_heads(args) ? int(args.heads_q) : head + 1;
  double sum = 0;
  for (int b = batch; b < batch_end; ++b)
#pragma unroll 4
    for (int h = head; h < head_end; ++h) {
      const float x = __ldg(args.sums + (b * args.heads_q + h) * args.length_k + key);
      float factor = 1;
      if (args.factors.data)
        factor = __ldg(static_cast<const float*>(args.factors.data) + b * args.factors.batch_stride +
                       h * args.factors.head_stride + sequence.first_k + key);
      if (factor != 0) sum += double(x) * factor;  // where it is 0 the sum may be infinite
    }
  args.to[batch * args.batch_stride + head * args.head_stride + (sequence.first_k + key) * args.key_stride] =
      float(sum);
}

void launch_term_sums(const TermSumsArguments& args, std::int64_t packed_rows_k, cudaStream_t stream) {
  const std::int64_t heads = shares_heads(args) ? 1 : args.heads_q, batch = shares_batch(args) ? 1 : args.batch;
  if (args.cu_seqlens_q)
    check(cudaMemsetAsync(args.to, 0, std::size_t(heads * packed_rows_k) * sizeof(float), stream), "cudaMemsetAsync");
  launch_kernel("attnx_term_sums", attnx_term_sums, batch * heads * ((args.length_k + kThreads - 1) / kThreads),
                kThreads, 0, stream, args);
}

}  // namespace attnx::cuda
