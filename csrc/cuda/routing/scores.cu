// CUTLASS computes the scores. A float32 is split into two TF32, and three of their four products are added up: this is
// the tensor cores' way to float32 accuracy, at several times the rate of plain float32.
#include "scores.h"

#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/kernel/default_gemm.h>
#include <cutlass/gemm/kernel/gemm_batched.h>

#include <stdexcept>

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

using Tile = cutlass::gemm::GemmShape<128, 64, 16>;  // centroids, rows, features
using Swizzle = cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle;
using Output = cutlass::epilogue::thread::LinearCombination<float, kScoreVector, float, float,
                                                            cutlass::epilogue::thread::ScaleType::Nothing>;
// Warps of 64 x 32 fill all registers, but do not spill; they read shared memory and split operands less often than
// smaller ones. What lies beyond a matrix is zero in shared memory, so that nothing is read before it is written.
using Gemm = cutlass::gemm::kernel::DefaultGemm<
    float, cutlass::layout::RowMajor, kScoreVector, float, cutlass::layout::ColumnMajor, kScoreVector, float,
    cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile,
    cutlass::gemm::GemmShape<64, 32, 16>, cutlass::gemm::GemmShape<16, 8, 8>, Output, Swizzle, /*Stages=*/3,
    /*SplitKSerial=*/false, cutlass::arch::OpMultiplyAddFastF32,
    cutlass::gemm::SharedMemoryClearOption::kZfill>::GemmKernel;
using Batched = cutlass::gemm::kernel::GemmBatched<Gemm::Mma, Gemm::Epilogue, Swizzle>;

struct ScoreArguments {  // keeps CUTLASS's types out of the kernel's name
  Batched::Params params;
};

__global__ void __launch_bounds__(Batched::kThreadCount)
    attnx_routing_scores(const __grid_constant__ ScoreArguments args) {
  extern __shared__ __align__(16) char memory[];
  Batched()(args.params, *reinterpret_cast<Batched::SharedStorage*>(memory));
}

void check_at_most(const char* name, std::int64_t value, std::int64_t limit) {
  if (value > limit)
    throw std::runtime_error(std::string("routing_scores: ") + name + ": expected at most " + std::to_string(limit) +
                             ", got " + std::to_string(value));
}

// The kernel copies 16 bytes at a time, and strides between rows are 32 bits wide in CUTLASS.
void check_matrix(const char* name, const ScoreMatrix& matrix, std::int64_t columns) {
  if (reinterpret_cast<std::uintptr_t>(matrix.data) % 16 != 0 || matrix.row_stride % kScoreVector != 0 ||
      matrix.problem_stride % kScoreVector != 0 || matrix.row_stride < padded_to_vectors(columns))
    throw std::runtime_error(std::string("routing_scores: ") + name +
                             ": expected an address and strides that are multiples of 16 bytes, and rows of " +
                             std::to_string(padded_to_vectors(columns)) + " numbers, got row stride " +
                             std::to_string(matrix.row_stride) + ", problem stride " +
                             std::to_string(matrix.problem_stride));
  check_at_most(name, matrix.row_stride, INT32_MAX);
}

}  // namespace

void routing_scores(const ScoreParams& p, const Launch& launch) {
  if (p.problems == 0 || p.rows == 0 || p.centroids == 0) return;
  if (p.features % kScoreVector != 0)
    throw std::runtime_error("routing_scores: features: expected a multiple of 4, got " + std::to_string(p.features));
  check_matrix("row_matrix", p.row_matrix, p.features);
  check_matrix("centroid_matrix", p.centroid_matrix, p.features);
  check_matrix("score_matrix", p.score_matrix, p.rows);
  constexpr std::int64_t kBlocks = 65535;  // the most blocks of a grid, but for the first dimension
  check_at_most("problems", p.problems, kBlocks);
  check_at_most("rows", p.rows, kBlocks * Tile::kN);
  check_at_most("centroids", p.centroids, INT32_MAX - Tile::kM);

  const cutlass::gemm::GemmCoord size(int(p.centroids), int(p.rows), int(p.features));
  const auto tiles = Swizzle::get_tiled_shape(size, {Tile::kM, Tile::kN, Tile::kK}, int(p.problems));
  const auto stride = [](const ScoreMatrix& matrix) { return int(matrix.row_stride); };
  const Gemm::Epilogue::OutputTileIterator::TensorRef scores(p.score_matrix.data, stride(p.score_matrix));
  const ScoreArguments args{{size,
                             tiles,
                             {p.centroid_matrix.data, stride(p.centroid_matrix)},
                             p.centroid_matrix.problem_stride,
                             {p.row_matrix.data, stride(p.row_matrix)},
                             p.row_matrix.problem_stride,
                             scores,
                             p.score_matrix.problem_stride,
                             scores,
                             p.score_matrix.problem_stride,
                             {},
                             int(p.problems)}};
  static_assert(sizeof(Batched::SharedStorage) <= 48 * 1024);  // else a kernel has to ask for it
  void* arguments[] = {const_cast<ScoreArguments*>(&args)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(attnx_routing_scores), Swizzle::get_grid_shape(tiles),
                         Batched::kThreadCount, arguments, sizeof(Batched::SharedStorage),
                         static_cast<cudaStream_t>(launch.stream)),
        "attnx_routing_scores");
}

}  // namespace attnx::cuda
