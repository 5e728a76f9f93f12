#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "kernels.h"

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

#define ATTNX_DECLARE(isa, supported)                                     \
  namespace isa {                                                         \
  std::size_t forward_workspace(const ForwardParams&, const Executor&);   \
  void forward(const ForwardParams&, const Executor&, char*);             \
  std::size_t backward_workspace(const BackwardParams&, const Executor&); \
  void backward(const BackwardParams&, const Executor&, char*);           \
  }
ATTNX_FOR_EACH_ISA(ATTNX_DECLARE)
#undef ATTNX_DECLARE

namespace {

struct InstructionSet {
  const char* name;
  bool supported;
  Kernels kernels;
};

const std::vector<InstructionSet>& known() {
#define ATTNX_ENTRY(isa, supported) \
  {#isa, bool(supported), {isa::forward_workspace, isa::forward, isa::backward_workspace, isa::backward}},
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
Executor enough_for(const AttentionParams& p, Executor executor) {
  const double operations =
      2.0 * double(p.batch * p.heads_q) * double(p.length_q) * double(p.length_k) * double(p.head_dim + p.value_dim);
  executor.threads = int(std::min(double(executor.threads), 1 + operations / 1e6));
  return executor;
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

void forward(const ForwardParams& params, const Executor& available) {
  const Executor executor = enough_for(params, available);
  const Kernels& kernels = chosen().load()->kernels;
  const auto workspace = allocate(kernels.forward_workspace(params, executor));
  kernels.forward(params, executor, workspace.get());
}

void backward(const BackwardParams& params, const Executor& available) {
  const Executor executor = enough_for(params, available);
  const Kernels& kernels = chosen().load()->kernels;
  const auto workspace = allocate(kernels.backward_workspace(params, executor));
  kernels.backward(params, executor, workspace.get());
}

}  // namespace attnx::cpu
