// These are the instructions of sm_90a that CUDA C++ has no name for, one function each (PTX ISA 9.0, sections 9.7.9,
// 9.7.13 and 9.7.19): mbarriers, the tensor memory accelerator (TMA), named barriers, and registers that move between
// roles.
#pragma once

#include <cuda.h>

#include "cuda/common/ptx.h"

namespace attnx::cuda {

// These change the registers of a warpgroup's threads from those that the block was launched with. All four warps call
// them, once, at the start of their role. The number is a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void release_registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// At a named barrier of the block, 1 to 15, this many threads meet.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// mbarriers are named by their addresses in shared memory. A phase ends when `arrivals` and all announced bytes have
// come in; a wait is for the end of the phase of this parity. Of a fresh barrier the phase before the first, of parity
// 1, counts as ended.
__device__ __forceinline__ void init_barrier(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// This makes the initialisation visible to TMA; then the block meets.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The barrier is arrived at, once, when the copies that this thread has started by copy_async have ended. It is among
// the arrivals that the barrier was made for.
__device__ __forceinline__ void arrive_after_copies(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// What this thread wrote to shared memory, or read of it, comes before what TMA and wgmma do there after the next
// barrier. The fence is needed because they are another proxy.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// These policies, as createpolicy makes them for whole lines, say how long lines stay in L2.
inline constexpr std::uint64_t kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000;

__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// TMA loads a box of a tensor of five dimensions, from these coordinates on, to shared memory; the barrier gets its
// bytes. What lies outside the tensor becomes 0, and counts.
__device__ __forceinline__ void load_box(std::uint32_t to, const CUtensorMap& from, const int (&at)[5],
                                         std::uint32_t barrier, std::uint64_t cache_policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
      "l"(&from), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]), "l"(cache_policy)
      : "memory");
}
// This goes the other way, as part of the thread's next group. What lies outside the tensor is not written.
__device__ __forceinline__ void store_box(const CUtensorMap& to, const int (&at)[5], std::uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&to),
      "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
      : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The first waits until all groups of this thread have read their shared memory; the second until they have been
// written, too.
__device__ __forceinline__ void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace attnx::cuda
