#include "tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

constexpr std::int64_t kElementBytes = 2, kGranule = 16;  // bytes

struct Dimensions {
  cuuint64_t sizes[5];
  std::int64_t strides[4];  // in bytes, of all but the features
};

Dimensions dimensions(const TmaTensor& x) {
  const Tensor& t = x.tensor;
  const std::int64_t sizes[] = {x.features, x.group, x.rows, x.heads / x.group, x.batch};
  const std::int64_t strides[] = {t.head_stride, t.row_stride, t.head_stride * x.group, t.batch_stride};
  Dimensions result{};
  std::copy_n(sizes, 5, result.sizes);
  // The stride of a dimension of one element says nothing.
  for (int i = 0; i < 4; ++i) result.strides[i] = sizes[i + 1] == 1 ? kGranule : strides[i] * kElementBytes;
  return result;
}

// The function comes from the driver that is loaded, so that libattnx need not link it.
auto encode_tiled() {
  using Function = decltype(&cuTensorMapEncodeTiled);
  static const Function function = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("cuTensorMapEncodeTiled: expected in the CUDA driver, got none");
    return reinterpret_cast<Function>(symbol);
  }();
  return function;
}

}  // namespace

bool fits_tma(const TmaTensor& x) {
  const Dimensions d = dimensions(x);
  const auto is_whole = [](std::int64_t stride) {
    return stride > 0 && stride % kGranule == 0 && stride < std::int64_t(1) << 40;
  };
  return reinterpret_cast<std::uintptr_t>(x.tensor.data) % kGranule == 0 &&
         std::all_of(std::begin(d.sizes), std::end(d.sizes),
                     [](cuuint64_t size) { return size > 0 && size < cuuint64_t(1) << 31; }) &&
         std::all_of(std::begin(d.strides), std::end(d.strides), is_whole);
}

CUtensorMap make_tensor_map(const TmaTensor& x, int box_rows) {
  const Dimensions d = dimensions(x);
  cuuint64_t strides[4];
  std::copy_n(d.strides, 4, strides);
  const cuuint32_t box[] = {64, cuuint32_t(x.group), cuuint32_t(box_rows / x.group), 1, 1};
  const cuuint32_t every[] = {1, 1, 1, 1, 1};
  const auto type = x.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  const CUresult status =
      encode_tiled()(&map, type, 5, x.tensor.data, d.sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: CUDA driver error " + std::to_string(int(status)));
  return map;
}

}  // namespace attnx::cuda
