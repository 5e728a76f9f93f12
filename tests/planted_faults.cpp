// It calls a kernel once as it should be called, and once with the fault that its argument names, which a sanitizer
// must report; `.ci/run sanitizers` and `.ci/run threads` see to it. The kernels are those that the library has: faults
// are in what they are told, which no operator would let pass.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/own_threads.h"

namespace attnx {

namespace {

constexpr std::int64_t kHeads = 8, kRows = 64, kDim = 64;

// The tensors of one call.
struct Call {
  std::vector<float> query = numbers(), key = numbers(), value = numbers(), output = numbers();
  ForwardParams p;

  Call() {
    p.heads_q = p.heads_k = kHeads;
    p.batch = 1;
    p.length_q = p.length_k = kRows;
    p.head_dim = p.value_dim = kDim;
    p.scale = 0.125;
    p.window_left = p.window_right = -1;
    p.query = view(query), p.key = view(key), p.value = view(value), p.output = view(output);
  }

  static std::vector<float> numbers() {
    std::vector<float> x(std::size_t(kHeads * kRows * kDim));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = float(i % 7) - 3;
    return x;
  }
  static Tensor view(std::vector<float>& x) { return {x.data(), kHeads * kRows * kDim, kRows * kDim, kDim}; }

  float run(const cpu::Executor& executor) {
    cpu::forward(p, executor);
    return output[0];
  }
};

// Every worker is told that it is the first, so that all of them use its memory.
cpu::Executor with_one_worker_twice() {
  return {4, [](const cpu::Executor&, void (*task)(void*, int), void* context) {
            std::thread one([&] { task(context, 0); }), other([&] { task(context, 0); });
            one.join();
            other.join();
          }};
}

float run(const std::string& fault) {
  Call call;
  if (fault == "none") return call.run(cpu::on_own_threads(4));
  if (fault == "overrun") {  // the last row of the last head begins one element later than it lies
    call.p.key.data = call.key.data() + 1;
    return call.run(cpu::on_own_threads(1));
  }
  if (fault == "misaligned") {
    call.p.alibi_slopes.data = reinterpret_cast<const char*>(call.query.data()) + 1;
    call.p.alibi_slopes.stride = 1;
    return call.run(cpu::on_own_threads(1));
  }
  if (fault == "race") return call.run(with_one_worker_twice());
  std::fprintf(stderr, "expected none, overrun, misaligned or race, got %s\n", fault.c_str());
  std::exit(2);
}

}  // namespace

}  // namespace attnx

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const bool finite = std::isfinite(attnx::run("none"));
  std::puts(finite ? "served" : "not finite");
  return std::isfinite(attnx::run(arguments[1])) && finite ? 0 : 1;
}
