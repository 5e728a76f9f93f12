#include "backend.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "attnx/environment.h"
#include "cpu/attention.h"
#include "cuda/attention.h"

namespace attnx::ops {

namespace {

constexpr bool kWithCuda = ATTNX_WITH_CUDA;

cpu::Executor executor() {
  return {int(torch::stable::get_num_threads()),
          [](const cpu::Executor& self, void (*task)(void*, int), void* context) {
            torch::stable::parallel_for(0, self.threads, 1, [&](std::int64_t begin, std::int64_t end) {
              for (std::int64_t worker = begin; worker < end; ++worker) task(context, int(worker));
            });
          }};
}

// In libtorch_cuda, which only CUDA builds of torch have, so that libattnx cannot link it.
void* current_stream(std::int32_t device) {
  using Getter = AOTITorchError (*)(std::int32_t, void**);
  static const auto getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  check(getter, "aoti_torch_get_current_cuda_stream: expected in libtorch_cuda.so, got none");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

// Where a launch goes, for as long as this lives: the device of a tensor, which becomes the current one, and its
// stream; or the emulator, which has one of each and runs on host memory.
class CudaContext {
 public:
  explicit CudaContext(const StableTensor& x) : tensor_(x) {
    if (!x.is_cuda()) return;
    guard_.emplace(x.get_device_index());
    launch.stream = current_stream(x.get_device_index());
  }

  // Torch keeps the memory until the stream has done what was enqueued while this lived.
  void reserve(std::size_t bytes) {
    if (bytes == 0) return;
    constexpr std::size_t kAlignment = 256;  // torch gives 512 on devices, but 64 on the host
    workspace_ = torch::stable::new_empty(tensor_, std::vector{std::int64_t(bytes + kAlignment - 1)}, ScalarType::Byte);
    const auto address = reinterpret_cast<std::uintptr_t>(workspace_->data_ptr());
    launch.workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

  cuda::Launch launch;

 private:
  const StableTensor& tensor_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::optional<StableTensor> workspace_;
};

}  // namespace

bool uses_cuda(const StableTensor& query) {
  if (query.is_cuda()) return true;
  if (!kCudaOnHost) return false;
  check(kWithCuda, "ATTNX_CUDA_ON_HOST: expected a build with CUDA kernels, got one without");
  if constexpr (kWithCuda) {
    check(cuda::emulated(), "ATTNX_CUDA_ON_HOST: expected the CUDA emulator as the CUDA runtime, got another");
  }
  return true;
}

void run(const ForwardParams& params, const StableTensor& query) {
  if (!uses_cuda(query)) {
    cpu::forward(params, executor());
  } else if constexpr (kWithCuda) {
    CudaContext context(query);
    context.reserve(cuda::forward_workspace(params, context.launch));
    cuda::forward(params, context.launch);
  }
}

void run(const BackwardParams& params, const StableTensor& query, bool deterministic) {
  if (!uses_cuda(query)) {
    cpu::backward(params, executor());
  } else if constexpr (kWithCuda) {
    CudaContext context(query);
    context.launch.deterministic = deterministic;
    context.reserve(cuda::backward_workspace(params, context.launch));
    cuda::backward(params, context.launch);
  }
}

void run(const LinearForwardParams& params) { cpu::linear_forward(params, executor()); }
void run(const LinearBackwardParams& params) { cpu::linear_backward(params, executor()); }
void run(const SelectParams& params) { cpu::select(params, executor()); }
void run(const NearestParams& params) { cpu::nearest(params, executor()); }
void run(const CentroidSumsParams& params) { cpu::centroid_sums(params, executor()); }
void run(const LabelBlocksParams& params) { cpu::label_blocks(params, executor()); }
void run(const CriticalBlocksParams& params) { cpu::critical_blocks(params, executor()); }
void run(const SampleBlocksParams& params) { cpu::sample_blocks(params, executor()); }
void run(const CorrectionParams& params) { cpu::corrections(params, executor()); }
void run(const CompactClustersParams& params) { cpu::compact_clusters(params, executor()); }
void run(const SortByClusterParams& params) { cpu::sort_by_cluster(params, executor()); }
void run(const HalveSumsParams& params) { cpu::halve_sums(params, executor()); }
void run(const UpdateCentroidsParams& params) { cpu::update_centroids(params, executor()); }
void run(const StaircaseAppendParams& params) { cpu::staircase_append(params, executor()); }
void run(const StaircaseCropParams& params) { cpu::staircase_crop(params, executor()); }
void run(const StaircaseReadParams& params) { cpu::staircase_read(params, executor()); }
void run_on_host(const ForwardParams& params) { cpu::forward(params, executor()); }

ScalarType sum_type(const StableTensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

StableTensor sum_over_batch(const std::optional<StableTensor>& per_sequence, const StableTensor& query) {
  const std::vector shape{query.size(1)};
  if (!per_sequence) return torch::stable::new_zeros(query, shape, sum_type(query));
  StableTensor result = torch::stable::new_empty(query, shape, sum_type(query));
  const std::int64_t batch = per_sequence->size(0), heads = per_sequence->size(1);
  const auto* from = static_cast<const double*>(per_sequence->data_ptr());
  if (!uses_cuda(query)) {
    const DType dtype = result.scalar_type() == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
    cpu::sum_over_batch({dtype, batch, heads, from, result.data_ptr()}, executor());
  } else if constexpr (kWithCuda) {
    const CudaContext context(query);
    cuda::sum_over_batch(from, static_cast<float*>(result.data_ptr()), batch, heads, context.launch);
  }
  return result;
}

}  // namespace attnx::ops
