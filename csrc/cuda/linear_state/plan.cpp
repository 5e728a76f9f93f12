#include "cuda/linear_state/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/common/device.h"

namespace attnx::cuda {

namespace {

constexpr std::int64_t kLeastChunks = 2;       // of a segment
constexpr std::int64_t kUnitsOfProcessor = 2;  // a multiprocessor's share of segments

}  // namespace

LinearStateArguments plan_tiles(const LinearStateParams& p, int (*bytes)(const LinearStateArguments&)) {
  LinearStateArguments args{};
  args.p = p;
  args.scale = p.taylor ? float(p.scale) : 1;
  args.features = int(p.features());
  args.state_size = p.features() * (p.value_dim + 1);
  args.segments = 1;
  // With the column of ones a tile has whole blocks of 8 columns.
  for (const std::int64_t most : {71, 63, 31, 15, 7}) {
    args.tiles = int((p.value_dim + most - 1) / most);
    args.width = int((p.value_dim + args.tiles - 1) / args.tiles);
    for (args.chunk = 64; args.chunk >= 16; args.chunk /= 2)
      if (bytes(args) <= current_device().shared_bytes) return args;
  }
  throw std::runtime_error("query: expected a head_dim whose state's columns fit shared memory, got " +
                           std::to_string(p.head_dim));
}

void plan_segments(LinearStateArguments& args, std::int64_t tokens) {
  const std::int64_t units = std::max<std::int64_t>(args.p.batch * args.p.heads_k * args.tiles, 1);
  const std::int64_t chunks = (tokens + args.chunk - 1) / args.chunk;
  const std::int64_t wanted = (kUnitsOfProcessor * current_device().sm_count + units - 1) / units;
  const std::int64_t of_segment =
      std::max(chunks / std::clamp<std::int64_t>(chunks / kLeastChunks, 1, wanted), kLeastChunks);
  args.of_segment = of_segment * args.chunk;
  args.segments = int(std::max<std::int64_t>((chunks + of_segment - 1) / of_segment, 1));
}

}  // namespace attnx::cuda
