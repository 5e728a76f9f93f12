#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string_view>

#include "cpu/instruction_sets.h"
#include "kernels.h"

namespace attnx::cpu {

#define ATTNX_DECLARE_KERNEL(name, Params)                      \
  std::size_t name##_workspace(const Params&, const Executor&); \
  void name(const Params&, const Executor&, char*);
#define ATTNX_POINT_TO_KERNEL(name, Params) name##_workspace, name,
// A name of the dtype's namespace, or else of the instruction set's.
#define ATTNX_DECLARE_DTYPE(dtype)                                                    \
  namespace dtype {                                                                   \
  ATTNX_FOR_EACH_LOOP(ATTNX_DECLARE_KERNEL)                                           \
  static constexpr Kernels kKernels = {ATTNX_FOR_EACH_KERNEL(ATTNX_POINT_TO_KERNEL)}; \
  }
#define ATTNX_DECLARE_ISA(isa)               \
  namespace isa {                            \
  ATTNX_FOR_EACH_OTHER(ATTNX_DECLARE_KERNEL) \
  ATTNX_DECLARE_DTYPE(float32)               \
  ATTNX_DECLARE_DTYPE(bfloat16)              \
  ATTNX_DECLARE_DTYPE(float16)               \
  ATTNX_DECLARE_DTYPE(float64)               \
  }
ATTNX_FOR_EACH_ISA(ATTNX_DECLARE_ISA)
#undef ATTNX_DECLARE_ISA
#undef ATTNX_DECLARE_DTYPE
#undef ATTNX_POINT_TO_KERNEL
#undef ATTNX_DECLARE_KERNEL

namespace {

struct InstructionSet {
  const char* name;
  bool supported;  // by this machine
  Kernels float32, bfloat16, float16, float64;

  const Kernels& kernels(DType dtype) const {
    switch (dtype) {
      case DType::kFloat32: return float32;
      case DType::kBFloat16: return bfloat16;
      case DType::kFloat16: return float16;
      case DType::kFloat64: return float64;
    }
    throw std::invalid_argument("dtype: expected a value of DType, got " + std::to_string(int(dtype)));
  }
};

bool supports(std::string_view isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool wide =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return wide && __builtin_cpu_supports("avx512f");
  if (isa == "avx512_bf16") return wide && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == "baseline";
}

const std::vector<InstructionSet>& known() {
#define ATTNX_ENTRY(isa)    \
  {#isa,                    \
   supports(#isa),          \
   isa::float32::kKernels,  \
   isa::bfloat16::kKernels, \
   isa::float16::kKernels,  \
   isa::float64::kKernels},
  static const std::vector<InstructionSet> sets = {ATTNX_FOR_EACH_ISA(ATTNX_ENTRY)};
#undef ATTNX_ENTRY
  return sets;
}

const InstructionSet* find(const char* asker, const std::string& name) {
  std::string usable;
  for (const auto& set : known()) {
    if (!set.supported) continue;
    if (set.name == name) return &set;
    usable += (usable.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::invalid_argument(std::string(asker) + ": expected one of " + usable + ", got " + name);
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set = [] {
    if (const char* name = std::getenv("ATTNX_CPU_ISA"); name && *name) return find("ATTNX_CPU_ISA", name);
    return find("", instruction_sets().back());
  }();
  return set;
}

struct Free {
  void operator()(char* block) const { ::operator delete(block, std::align_val_t(64)); }
};
std::unique_ptr<char, Free> allocate(std::size_t bytes) {
  return std::unique_ptr<char, Free>(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
}

// A thread more for every million operations: about as long as it takes to wake one.
Executor enough_for(double operations, Executor executor) {
  executor.threads = int(std::min(double(executor.threads), 1 + operations / 1e6));
  return executor;
}

double operations(const AttentionParams& p) {
  if (p.gather)
    return 2.0 * double(p.batch * p.heads_q) * double(p.gather->queries.slots) * double(p.length_k) *
           double(p.head_dim + p.value_dim);
  return 2.0 * double(p.batch * p.heads_q) * double(p.length_q) * double(p.length_k) * double(p.head_dim + p.value_dim);
}
double operations(const LinearParams& p) {
  return 2.0 * double(p.batch) * double(p.heads_q * p.length_q + p.heads_k * p.length_k) *
         double(p.head_dim * p.value_dim);
}
double operations(const RouteParams& p) {
  return 2.0 * double(p.batch * p.heads * p.length) * double(p.clusters * p.head_dim);
}
double operations(const CentroidSumsParams& p) { return 8.0 * double(p.batch * p.heads * p.length * p.head_dim); }

// A number that is quantised or read takes as long as some 64 operations of attention.
template <class Params>
double rows_as_operations(const Params& p, std::int64_t tokens) {
  return 64.0 * double(p.batch * p.cache.heads * tokens * p.cache.layout.head_dim);
}
double operations(const StaircaseAppendParams& p) {
  std::int64_t most = 0;
  for (std::int64_t b = 0; b < p.batch; ++b)
    most = std::max(most, p.next_state[b * p.cache.layout.state_size()] - p.cache.of(b).length());
  return rows_as_operations(p, most);
}
double operations(const StaircaseReadParams& p) { return rows_as_operations(p, p.count); }
double operations(const StaircaseCropParams& p) { return rows_as_operations(p, p.cache.layout.window); }

template <class Params>
void run(std::size_t (*Kernels::*workspace_bytes)(const Params&, const Executor&),
         void (*Kernels::*kernel)(const Params&, const Executor&, char*), const Params& params,
         const Executor& available) {
  const Executor executor = enough_for(operations(params), available);
  const Kernels& kernels = chosen().load()->kernels(params.dtype);
  const auto workspace = allocate((kernels.*workspace_bytes)(params, executor));
  (kernels.*kernel)(params, executor, workspace.get());
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& set : known())
    if (set.supported) names.push_back(set.name);
  return names;
}

std::string instruction_set() { return chosen().load()->name; }

void use_instruction_set(const std::string& name) { chosen() = find("name", name); }

void forward(const ForwardParams& params, const Executor& executor) {
  if (params.gather) {
    run(&Kernels::routed_forward_workspace, &Kernels::routed_forward, params, executor);
  } else {
    run(&Kernels::forward_workspace, &Kernels::forward, params, executor);
  }
}

void backward(const BackwardParams& params, const Executor& executor) {
  if (params.gather) {
    run(&Kernels::routed_backward_workspace, &Kernels::routed_backward, params, executor);
  } else {
    run(&Kernels::backward_workspace, &Kernels::backward, params, executor);
  }
}

#define ATTNX_DEFINE(name, Params)                                     \
  void name(const Params& params, const Executor& executor) {          \
    run(&Kernels::name##_workspace, &Kernels::name, params, executor); \
  }
ATTNX_DEFINE(linear_forward, LinearForwardParams)
ATTNX_DEFINE(linear_backward, LinearBackwardParams)
ATTNX_DEFINE(select, SelectParams)
ATTNX_DEFINE(nearest, NearestParams)
ATTNX_DEFINE(centroid_sums, CentroidSumsParams)
ATTNX_DEFINE(staircase_append, StaircaseAppendParams)
ATTNX_DEFINE(staircase_crop, StaircaseCropParams)
ATTNX_DEFINE(staircase_read, StaircaseReadParams)
#undef ATTNX_DEFINE

}  // namespace attnx::cpu
