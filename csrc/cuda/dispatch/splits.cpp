#include "splits.h"

#include <algorithm>

#include "cuda/dispatch/tiling.h"

namespace attnx::cuda {

int choose_splits(std::int64_t tiles, std::int64_t key_tiles, int slots) {
  if (tiles * 5 >= std::int64_t(slots) * 4 || key_tiles <= 4) return 1;
  const auto efficiency = [&](std::int64_t splits) {
    const double waves = double(tiles * splits) / slots;
    return waves / std::max(1.0, double(ceil_div(tiles * splits, slots)));
  };
  const std::int64_t most = std::min<std::int64_t>(std::min<std::int64_t>(128, slots), key_tiles);
  double best = 0;
  for (std::int64_t splits = 1; splits <= most; ++splits) best = std::max(best, efficiency(splits));
  std::int64_t splits = 1;
  while (efficiency(splits) < 0.85 * best) ++splits;
  return int(splits);
}

}  // namespace attnx::cuda
