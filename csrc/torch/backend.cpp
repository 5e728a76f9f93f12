#include "backend.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>
#include <type_traits>
#include <vector>

#include "attnx/capability.h"
#include "attnx/environment.h"
#include "cpu/attention.h"
#include "cpu/joined.h"
#include "cpu/own_threads.h"
#include "cuda/attention.h"

namespace attnx::cuda {

// These make the call of CUDA's kernel from the parameters of the CPU's. Results are float32, as CUDA has no kernels of
// float64.
inline std::size_t sum_over_batch_workspace(const SumOverBatchParams&, const Launch&) { return 0; }
inline void sum_over_batch(const SumOverBatchParams& p, const Launch& launch) {
  sum_over_batch(p.from, static_cast<float*>(p.to), p.batch, p.heads, launch);
}

}  // namespace attnx::cuda

namespace attnx::ops {

namespace {

constexpr bool kWithCuda = ATTNX_WITH_CUDA;

cpu::Executor executor() {
  const int threads = int(torch::stable::get_num_threads());
#if defined(__SANITIZE_THREAD__)
  return cpu::on_own_threads(threads);
#else
  return {threads, [](const cpu::Executor& self, void (*task)(void*, int), void* context) {
            // Torch tells of an error in a worker only that there was one.
            std::exception_ptr error;
            std::once_flag first;
            torch::stable::parallel_for(0, self.threads, 1, [&](std::int64_t begin, std::int64_t end) {
              try {
                for (std::int64_t worker = begin; worker < end; ++worker) task(context, int(worker));
              } catch (...) {
                std::call_once(first, [&] { error = std::current_exception(); });
              }
            });
            if (error) std::rethrow_exception(error);
          }};
#endif
}

// The function is in libtorch_cuda, which only CUDA builds of torch have, so libattnx cannot link it and looks it up
// here.
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

// This says where launches go for as long as it lives: to the device of the target, which becomes the current one, and
// its stream; or to the emulator, which has one of each and runs on host memory.
class CudaContext {
 public:
  explicit CudaContext(const Target& target) : target_(target) {
    launch.deterministic = target.deterministic;
    if (!target.tensor.is_cuda()) return;
    guard_.emplace(target.tensor.get_device_index());
    launch.stream = current_stream(target.tensor.get_device_index());
  }

  // Torch keeps the memory until the stream has done what was enqueued while this lived.
  void reserve(std::size_t bytes) {
    if (bytes == 0) return;
    constexpr std::size_t kAlignment = 256;  // torch gives 512 on devices, but 64 on the host
    workspace_ = make_empty(target_.tensor, std::vector{std::int64_t(bytes + kAlignment - 1)}, ScalarType::Byte);
    const auto address = reinterpret_cast<std::uintptr_t>(workspace_->data_ptr());
    launch.workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

  cuda::Launch launch;

 private:
  const Target& target_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::optional<StableTensor> workspace_;
};

template <class Params>
using OnCpu = void (*)(const Params&, const cpu::Executor&);

template <class Params, class Workspace, class Kernel>
void run(const Params& params, const Target& target, std::type_identity_t<OnCpu<Params>> on_cpu,
         const Workspace& workspace, const Kernel& kernel) {
  if (!target.on_cuda()) return on_cpu(params, executor());
  if constexpr (kWithCuda && std::is_invocable_v<Kernel, const Params&, const cuda::Launch&>) {
    CudaContext context(target);
    context.reserve(workspace(params, context.launch));
    kernel(params, context.launch);
  } else {
    check(false, target.system, ": expected tensors on cpu, as CUDA has no kernel for this part of it, got one on ",
          device_of(target.tensor));
  }
}

}  // namespace

bool Target::on_cuda() const {
  if (tensor.is_cuda()) return true;
  if (!kCudaOnHost || !find_capability(system, "cuda")) return false;
  check(kWithCuda, "ATTNX_CUDA_ON_HOST: expected a build with CUDA kernels, got one without");
  if constexpr (kWithCuda) {
    check(cuda::emulated(), "ATTNX_CUDA_ON_HOST: expected the CUDA emulator as the CUDA runtime, got another");
  }
  return true;
}

const Capability& Target::capability() const {
  const Capability* row = find_capability(system, on_cuda() ? "cuda" : "cpu");
  check(row, system, ": expected tensors on cpu, as it has no CUDA kernel, got one on ", device_of(tensor));
  return *row;
}

// A CUDA kernel serves a system as soon as namespace cuda has name(params, launch) and name_workspace(params, launch),
// which these find by their arguments.
#define ATTNX_DEFINE(name, Params)                                                                       \
  void run(const Params& params, const Target& target) {                                                 \
    run(                                                                                                 \
        params, target, cpu::name,                                                                       \
        [](const auto& p, const auto& launch) -> decltype(name##_workspace(p, launch)) {                 \
          return name##_workspace(p, launch);                                                            \
        },                                                                                               \
        [](const auto& p, const auto& launch) -> decltype(name(p, launch)) { return name(p, launch); }); \
  }
ATTNX_FOR_EACH_RUN(ATTNX_DEFINE)
#undef ATTNX_DEFINE

void run(const ForwardParams& params, const LinearForwardParams& linear, const Target& target) {
  if (target.on_cuda()) {
    run(params, target);
    run(linear, target);
    return;
  }
  cpu::run_joined(
      executor(), [&](const cpu::Executor& executor) { cpu::forward(params, executor); },
      [&](const cpu::Executor& executor) { cpu::linear_forward(linear, executor); });
}

}  // namespace attnx::ops
