// This knows the instruction sets that were built, and the one in use.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "attention.h"
#include "cpu/instruction_sets.h"
#include "dispatch.h"

namespace attnx::cpu {

#define ATTNX_DECLARE_KERNEL(name, Params)                      \
  std::size_t name##_workspace(const Params&, const Executor&); \
  void name(const Params&, const Executor&, char*);
#define ATTNX_POINT_TO_KERNEL(name, Params) name##_workspace, name,
// A kernel's name is found in the dtype's namespace, or else in the instruction set's.
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
#define ATTNX_DECLARE_BFLOAT16(isa, plain) \
  namespace isa {                          \
  using namespace plain;                   \
  ATTNX_DECLARE_DTYPE(bfloat16)            \
  }
ATTNX_FOR_EACH_ISA(ATTNX_DECLARE_ISA, ATTNX_DECLARE_BFLOAT16)
#undef ATTNX_DECLARE_BFLOAT16
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
#define ATTNX_ENTRY(isa, ...) \
  {#isa,                      \
   supports(#isa),            \
   isa::float32::kKernels,    \
   isa::bfloat16::kKernels,   \
   isa::float16::kKernels,    \
   isa::float64::kKernels},
  static const std::vector<InstructionSet> sets = {ATTNX_FOR_EACH_ISA(ATTNX_ENTRY, ATTNX_ENTRY)};
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

}  // namespace

const Kernels& chosen_kernels(DType dtype) { return chosen().load()->kernels(dtype); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& set : known())
    if (set.supported) names.push_back(set.name);
  return names;
}

std::string instruction_set() { return chosen().load()->name; }

void use_instruction_set(const std::string& name) { chosen() = find("name", name); }

}  // namespace attnx::cpu
