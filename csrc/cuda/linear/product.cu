// CUTLASS sums states over scopes: a matrix of zeros and powers of two times one whose rows are states.
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/kernel/default_gemm.h>
#include <cutlass/gemm/kernel/gemm_batched.h>

#include <type_traits>

#include "cuda/common/device.h"
#include "cuda/linear/arguments.h"

namespace attnx::cuda {

namespace {

using Tile = cutlass::gemm::GemmShape<128, 128, 32>;  // rows of sums, numbers of a state, rows of states
using Swizzle = cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle;

// ScopeLayout is RowMajor, or ColumnMajor for the transposed product.
template <class Number, class ScopeLayout>
struct Product {
  using Output = cutlass::epilogue::thread::LinearCombination<Number, 8, float, float,
                                                              cutlass::epilogue::thread::ScaleType::Nothing>;
  using Gemm =
      typename cutlass::gemm::kernel::DefaultGemm<Number, ScopeLayout, 8, Number, cutlass::layout::RowMajor, 8, Number,
                                                  cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp,
                                                  cutlass::arch::Sm80, Tile, cutlass::gemm::GemmShape<64, 64, 32>,
                                                  cutlass::gemm::GemmShape<16, 8, 16>, Output, Swizzle, /*Stages=*/3,
                                                  /*SplitKSerial=*/false, cutlass::arch::OpMultiplyAdd>::GemmKernel;
  using Batched = cutlass::gemm::kernel::GemmBatched<typename Gemm::Mma, typename Gemm::Epilogue, Swizzle>;
  static_assert(sizeof(typename Batched::SharedStorage) <= 48 * 1024);  // else a kernel has to ask for it
};

template <class Number, class ScopeLayout>
struct ProductArguments {  // keeps CUTLASS's types out of the kernel's name
  typename Product<Number, ScopeLayout>::Batched::Params params;
};

template <class Number, class ScopeLayout>
__global__ void __launch_bounds__(Product<Number, ScopeLayout>::Batched::kThreadCount)
    attnx_linear_product(const __grid_constant__ ProductArguments<Number, ScopeLayout> args) {
  using Batched = typename Product<Number, ScopeLayout>::Batched;
  extern __shared__ __align__(16) char memory[];
  Batched()(args.params, *reinterpret_cast<typename Batched::SharedStorage*>(memory));
}

template <class Number, class ScopeLayout>
void launch_product(const LinearArguments& x, cudaStream_t stream) {
  using P = Product<Number, ScopeLayout>;
  constexpr bool kTransposed = std::is_same_v<ScopeLayout, cutlass::layout::ColumnMajor>;
  const int query_rows = x.heads_of_unit * x.query_blocks_of_head, key_rows = x.key_blocks_of_head;
  const int rows = kTransposed ? key_rows : query_rows, depth = kTransposed ? query_rows : key_rows;
  const auto states = static_cast<Number*>(kTransposed ? x.by_query : x.by_key);
  const auto sums = static_cast<Number*>(kTransposed ? x.by_key : x.by_query);
  const std::int64_t states_size = depth * x.state.size, sums_size = rows * x.state.size;
  if (depth == 0) {
    check(cudaMemsetAsync(sums, 0, std::size_t(x.units * sums_size) * sizeof(Number), stream), "cudaMemsetAsync");
    return;
  }
  const cutlass::gemm::GemmCoord size(rows, int(x.state.size), depth);
  const auto tiles = Swizzle::get_tiled_shape(size, {Tile::kM, Tile::kN, Tile::kK}, int(x.units));
  const std::int64_t scope_size = query_rows * x.scope_stride;
  const typename P::Gemm::Epilogue::OutputTileIterator::TensorRef to(sums, int(x.state.size));
  const ProductArguments<Number, ScopeLayout> args{
      {size,
       tiles,
       {static_cast<Number*>(x.scope) + x.first_unit * scope_size, int(x.scope_stride)},
       scope_size,
       {states, int(x.state.size)},
       states_size,
       to,
       sums_size,
       to,
       sums_size,
       {},
       int(x.units)}};
  void* arguments[] = {const_cast<ProductArguments<Number, ScopeLayout>*>(&args)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(attnx_linear_product<Number, ScopeLayout>),
                         Swizzle::get_grid_shape(tiles), P::Batched::kThreadCount, arguments,
                         sizeof(typename P::Batched::SharedStorage), stream),
        "attnx_linear_product");
}

}  // namespace

void launch_linear_product(const LinearArguments& args, bool transposed, DType dtype, cudaStream_t stream) {
  if (args.units * (transposed ? args.key_blocks_of_head : args.query_blocks_of_head) == 0) return;
  const auto launch = [&]<class Number>(Number) {
    transposed ? launch_product<Number, cutlass::layout::ColumnMajor>(args, stream)
               : launch_product<Number, cutlass::layout::RowMajor>(args, stream);
  };
  if (dtype == DType::kBFloat16) return launch(cutlass::bfloat16_t());
  launch(cutlass::half_t());
}

}  // namespace attnx::cuda
