#include "list_order.h"

#include "cuda/common/device.h"
#include "cuda/tiles/listed.h"

namespace attnx::cuda {

// A block has the list of a block of keys, and a warp has an entry of it.
__global__ void __launch_bounds__(256) attnx_list_order(const __grid_constant__ ListOrderArguments args) {
  const int key_block = blockIdx.x % args.block_rows, head = blockIdx.x / args.block_rows % args.heads;
  const int batch = blockIdx.x / args.block_rows / args.heads;
  const List queries(args.query_blocks, batch, head, key_block);
  for (int entry = threadIdx.x / 32; entry < queries.count(); entry += blockDim.x / 32) {
    const List keys(args.key_blocks, batch, head, queries.index(entry));
    int before = 0;
    for (int i = threadIdx.x % 32; i < keys.count(); i += 32) before += keys.index(i) < key_block;
    before = __reduce_add_sync(~0u, before);
    if (threadIdx.x % 32 == 0) args.order[queries.entry(entry) - args.query_blocks.indices] = before;
  }
}

void launch_list_order(const ListOrderArguments& args, cudaStream_t stream) {
  launch_kernel("attnx_list_order", attnx_list_order, std::int64_t(args.batch) * args.heads * args.block_rows, 256, 0,
                stream, args);
}

}  // namespace attnx::cuda
