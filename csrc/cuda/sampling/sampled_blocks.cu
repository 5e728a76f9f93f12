#include "sampled_blocks.h"

#include <math_constants.h>

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

struct SamplingArguments {
  BlockGrid grid;
  SamplingRound round;
  const float* keep;
  std::int64_t n;
  std::uint8_t* kept;
  double* arrival;
};

__global__ void __launch_bounds__(256) attnx_sampled_blocks(const __grid_constant__ SamplingArguments args) {
  const std::int64_t n = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= args.n) return;
  const std::int64_t rows = args.grid.query_blocks(), blocks = args.grid.key_blocks();
  const std::int64_t j = n % blocks, i = n / blocks % rows, head = n / blocks / rows;
  const BlockRow row(args.grid, i);
  args.kept[n] = false;
  args.arrival[n] = CUDART_INF;
  if (j >= row.candidates) return;  // where a row has none, j may lie beyond every distance
  const float p = args.keep[row.distance(j)];
  const std::uint32_t word = args.round.draw(head, i, j);
  args.kept[n] = is_kept(word, p);
  args.arrival[n] = arrival_time(word, p);
}

}  // namespace

void sampled_blocks(const BlockGrid& grid, const SamplingRound& round, const float* keep, std::int64_t heads,
                    std::uint8_t* kept, double* arrival, const Launch& launch) {
  const std::int64_t n = heads * grid.query_blocks() * grid.key_blocks();
  launch_kernel("attnx_sampled_blocks", attnx_sampled_blocks, (n + 255) / 256, 256, 0,
                static_cast<cudaStream_t>(launch.stream), SamplingArguments{grid, round, keep, n, kept, arrival});
}

}  // namespace attnx::cuda
