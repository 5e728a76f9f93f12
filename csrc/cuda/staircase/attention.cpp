#include "cuda/staircase/attention.h"

#include <stdexcept>

#include "cuda/dispatch/description.h"
#include "cuda/dispatch/range.h"
#include "cuda/staircase/decode/launch.h"
#include "cuda/staircase/loop.h"

namespace attnx::cuda {

namespace {

// Decoding reads and unpacks codes again for each block of rows, and the loop once for a tile of 128 rows, though to
// numbers, which takes longer. By the instructions of both (docs/notes/staircase.md) decoding is faster up to here.
constexpr std::int64_t kMostDecodedRows = 64;

// The host knows how many rows share a key head, but not how long sequences are.
bool is_decoded(const ForwardParams& p, std::optional<Mainloop> asked) {
  if (asked) return *asked == Mainloop::kDecode;
  return p.heads_q / p.heads_k * p.length_q <= kMostDecodedRows;
}

void check_alignment(const Staircase& cache) {
  for (const void* x : {static_cast<const void*>(cache.codes), static_cast<const void*>(cache.ranges),
                        static_cast<const void*>(cache.tail)})
    if (reinterpret_cast<std::uintptr_t>(x) % 16 != 0)
      throw std::runtime_error("cache: expected codes, ranges and tail to lie on 16 bytes");
}

}  // namespace

std::size_t staircase_attention_workspace(const ForwardParams& p, const Launch& where) {
  if (is_decoded(p, where.mainloop)) return DecodePlan(p, nullptr).workspace;
  return plan_staircase_loop(p, where.mainloop, nullptr).workspace;
}

void staircase_attention(const ForwardParams& p, const Launch& where) {
  const Range range("attnx::staircase_attention");
  check_alignment(*p.cache);
  const auto stream = static_cast<cudaStream_t>(where.stream);
  if (is_decoded(p, where.mainloop)) return run_decode(p, DecodePlan(p, where.workspace), stream);
  run_staircase_loop(p, plan_staircase_loop(p, where.mainloop, where.workspace), stream);
}

KernelDescription describe_staircase(const ForwardParams& p) {
  const auto asked = asked_mainloop();
  if (!is_decoded(p, asked)) {
    const ForwardPlan plan = plan_staircase_loop(p, asked, nullptr);
    return describe("forward", plan, plan.geometry.splits.divisor());
  }
  const DecodePlan plan(p, nullptr);
  KernelDescription x;
  x.kernel = "attnx_staircase_decode";
  x.mainloop = name_of(Mainloop::kDecode);
  x.rows = plan.rows;
  x.keys = kDecodeTokens;
  x.head_dim = plan.head_dim;
  x.splits = int(plan.splits);
  return x;
}

}  // namespace attnx::cuda
