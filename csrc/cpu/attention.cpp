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

#define ATTNX_DECLARE(isa, supported)                                                  \
  namespace isa {                                                                      \
  std::size_t forward_workspace(const ForwardParams&, const Executor&);                \
  void forward(const ForwardParams&, const Executor&, char*);                          \
  std::size_t backward_workspace(const BackwardParams&, const Executor&);              \
  void backward(const BackwardParams&, const Executor&, char*);                        \
  std::size_t linear_forward_workspace(const LinearForwardParams&, const Executor&);   \
  void linear_forward(const LinearForwardParams&, const Executor&, char*);             \
  std::size_t linear_backward_workspace(const LinearBackwardParams&, const Executor&); \
  void linear_backward(const LinearBackwardParams&, const Executor&, char*);           \
  std::size_t routed_forward_workspace(const ForwardParams&, const Executor&);         \
  void routed_forward(const ForwardParams&, const Executor&, char*);                   \
  std::size_t routed_backward_workspace(const BackwardParams&, const Executor&);       \
  void routed_backward(const BackwardParams&, const Executor&, char*);                 \
  std::size_t select_workspace(const SelectParams&, const Executor&);                  \
  void select(const SelectParams&, const Executor&, char*);                            \
  std::size_t nearest_workspace(const NearestParams&, const Executor&);                \
  void nearest(const NearestParams&, const Executor&, char*);                          \
  std::size_t centroid_sums_workspace(const CentroidSumsParams&, const Executor&);     \
  void centroid_sums(const CentroidSumsParams&, const Executor&, char*);               \
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
#define ATTNX_ENTRY(isa, supported)                                                                                \
  {#isa,                                                                                                           \
   bool(supported),                                                                                                \
   {isa::forward_workspace, isa::forward, isa::backward_workspace, isa::backward, isa::linear_forward_workspace,   \
    isa::linear_forward, isa::linear_backward_workspace, isa::linear_backward, isa::routed_forward_workspace,      \
    isa::routed_forward, isa::routed_backward_workspace, isa::routed_backward, isa::select_workspace, isa::select, \
    isa::nearest_workspace, isa::nearest, isa::centroid_sums_workspace, isa::centroid_sums}},
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
  if (p.gather.clusters)
    return 2.0 * double(p.batch * p.heads_q) * double(p.gather.queries.slots) * double(p.length_k) *
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

template <class Params>
void run(std::size_t (*Kernels::*workspace_bytes)(const Params&, const Executor&),
         void (*Kernels::*kernel)(const Params&, const Executor&, char*), const Params& params,
         const Executor& available) {
  const Executor executor = enough_for(operations(params), available);
  const Kernels& kernels = chosen().load()->kernels;
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
  if (params.gather.clusters) {
    run(&Kernels::routed_forward_workspace, &Kernels::routed_forward, params, executor);
  } else {
    run(&Kernels::forward_workspace, &Kernels::forward, params, executor);
  }
}

void backward(const BackwardParams& params, const Executor& executor) {
  if (params.gather.clusters) {
    run(&Kernels::routed_backward_workspace, &Kernels::routed_backward, params, executor);
  } else {
    run(&Kernels::backward_workspace, &Kernels::backward, params, executor);
  }
}

void linear_forward(const LinearForwardParams& params, const Executor& executor) {
  run(&Kernels::linear_forward_workspace, &Kernels::linear_forward, params, executor);
}

void linear_backward(const LinearBackwardParams& params, const Executor& executor) {
  run(&Kernels::linear_backward_workspace, &Kernels::linear_backward, params, executor);
}

void select(const SelectParams& params, const Executor& executor) {
  run(&Kernels::select_workspace, &Kernels::select, params, executor);
}

void nearest(const NearestParams& params, const Executor& executor) {
  run(&Kernels::nearest_workspace, &Kernels::nearest, params, executor);
}

void centroid_sums(const CentroidSumsParams& params, const Executor& executor) {
  run(&Kernels::centroid_sums_workspace, &Kernels::centroid_sums, params, executor);
}

}  // namespace attnx::cpu
