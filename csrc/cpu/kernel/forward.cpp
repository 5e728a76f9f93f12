// Compiled once per instruction set; picks the policies.
#include "forward.h"

#include "score/sigmoid.h"
#include "score/softmax.h"
#include "storage/strided.h"
#include "tiles/listed.h"

namespace attnx::cpu::ATTNX_ISA {

template <class Use>
static auto with_forward(const ForwardParams& p, const Executor& executor, Use use) {
  const auto with_input = [&]<class Input>() {
    const auto with_tiles = [&]<class Tiles>() {
      if (p.score == Score::kSigmoid) return use(Forward<Input, Sigmoid, Tiles, StridedStorage>(p, executor));
      return use(Forward<Input, Softmax, Tiles, StridedStorage>(p, executor));
    };
    return p.key_blocks.counts ? with_tiles.template operator()<ListedTiles>()
                               : with_tiles.template operator()<BandTiles>();
  };
  switch (p.dtype) {
    case DType::kBFloat16: return with_input.template operator()<BFloat16>();
    case DType::kFloat16: return with_input.template operator()<Float16>();
    case DType::kFloat64: return with_input.template operator()<double>();
    default: return with_input.template operator()<float>();
  }
}

std::size_t forward_workspace(const ForwardParams& p, const Executor& executor) {
  return with_forward(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void forward(const ForwardParams& p, const Executor& executor, char* workspace) {
  with_forward(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA
