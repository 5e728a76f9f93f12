// Compiled once per instruction set; picks the types.
#include "block_products.h"

#include "dtype.h"

namespace attnx::cpu::ATTNX_ISA {

std::size_t block_products_workspace(const BlockProductsParams& p, const Executor& executor) {
  return with_kernel<BlockProducts>(p, executor, [](const auto& f) { return std::size_t(f.workspace_bytes()); });
}

void block_products(const BlockProductsParams& p, const Executor& executor, char* workspace) {
  with_kernel<BlockProducts>(p, executor, [&](const auto& f) { f.run(workspace); });
}

}  // namespace attnx::cpu::ATTNX_ISA
