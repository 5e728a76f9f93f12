#include "cuda/delta_rule/plan.h"

#include <stdexcept>
#include <string>

#include "cuda/common/device.h"

namespace attnx::cuda {

DeltaRuleArguments plan_delta_rule(const DeltaRuleParams& p, int (*bytes)(const DeltaRuleArguments&)) {
  DeltaRuleArguments args{};
  args.p = p;
  args.heads = p.batch * p.heads_v;
  for (const std::int64_t most : {64, 32, 16, 8}) {
    args.tiles = int((p.value_dim + most - 1) / most);
    args.width = int((p.value_dim + args.tiles - 1) / args.tiles + 7) / 8 * 8;
    args.tiles = int((p.value_dim + args.width - 1) / args.width);
    for (args.chunk = kMaxDeltaChunk; args.chunk >= 16; args.chunk /= 2) {
      args.chunks = int((p.length + args.chunk - 1) / args.chunk);
      if (bytes(args) <= current_device().shared_bytes) return args;
    }
  }
  throw std::runtime_error("query: expected a head_dim whose state's columns fit shared memory, got " +
                           std::to_string(p.key_dim));
}

}  // namespace attnx::cuda
