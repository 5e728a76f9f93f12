// The instruction sets that were built, and the one in use.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "attention.h"
#include "dispatch.h"

namespace attnx::cpu {

#if defined(__x86_64__)
#define ATTNX_FOR_EACH_ISA(X)                                                                                \
  X(baseline, true)                                                                                          \
  X(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) \
  X(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                       \
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))                    \
  X(avx512_bf16, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&               \
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#else
#define ATTNX_FOR_EACH_ISA(X) X(baseline, true)
#endif

#define ATTNX_DECLARE_KERNEL(name, Params)                      \
  std::size_t name##_workspace(const Params&, const Executor&); \
  void name(const Params&, const Executor&, char*);
#define ATTNX_POINT_TO_KERNEL(name, Params) name##_workspace, name,
#define ATTNX_DECLARE(isa, supported)                                                 \
  namespace isa {                                                                     \
  ATTNX_FOR_EACH_KERNEL(ATTNX_DECLARE_KERNEL)                                         \
  static constexpr Kernels kKernels = {ATTNX_FOR_EACH_KERNEL(ATTNX_POINT_TO_KERNEL)}; \
  }
ATTNX_FOR_EACH_ISA(ATTNX_DECLARE)
#undef ATTNX_DECLARE
#undef ATTNX_POINT_TO_KERNEL
#undef ATTNX_DECLARE_KERNEL

namespace {

struct InstructionSet {
  const char* name;
  bool supported;
  Kernels kernels;
};

const std::vector<InstructionSet>& known() {
#define ATTNX_ENTRY(isa, supported) {#isa, bool(supported), isa::kKernels},
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

}  // namespace

const Kernels& chosen_kernels() { return chosen().load()->kernels; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& set : known())
    if (set.supported) names.push_back(set.name);
  return names;
}

std::string instruction_set() { return chosen().load()->name; }

void use_instruction_set(const std::string& name) { chosen() = find("name", name); }

}  // namespace attnx::cpu
