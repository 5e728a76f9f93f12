// This is wgmma: the asynchronous products of a warpgroup, 64 rows by 64, 80, 128 or 256 columns by 16 (PTX ISA 9.0,
// section 9.7.15). Operands lie in shared memory as SwizzledTile has them, or A lies in registers; sums are float32 in
// registers.
//
// Of a warp's 16 rows a lane holds those that Accumulators (tile.h) says, for the sums and for A in registers alike.
#pragma once

#include "cuda/common/ptx.h"

namespace attnx::cuda {

// This comes before the first product that reads or adds to registers which ordinary instructions wrote.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// This waits until at most this many of the warpgroup's newest groups are under way.
template <int kGroups>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// The compiler does not know that products write the sums while it goes on, so this keeps what it does with the sums on
// its own side.
template <int kM, int kN>
__device__ __forceinline__ void pin(float (&sums)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[m][n][e])::"memory");
}

#define ATTNX_10(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define ATTNX_REGISTERS_32 ATTNX_10() ATTNX_10(1) ATTNX_10(2) "%30, %31"
#define ATTNX_REGISTERS_40 ATTNX_10() ATTNX_10(1) ATTNX_10(2) "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define ATTNX_REGISTERS_64 ATTNX_10() ATTNX_10(1) ATTNX_10(2) ATTNX_10(3) ATTNX_10(4) ATTNX_10(5) "%60, %61, %62, %63"
#define ATTNX_REGISTERS_128 \
  ATTNX_10()                \
  ATTNX_10(1)               \
  ATTNX_10(2)               \
  ATTNX_10(3)               \
  ATTNX_10(4)               \
  ATTNX_10(5)               \
  ATTNX_10(6)               \
  ATTNX_10(7) ATTNX_10(8) ATTNX_10(9) ATTNX_10(10) ATTNX_10(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define ATTNX_SUMS_4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define ATTNX_SUMS_16(i) ATTNX_SUMS_4(i), ATTNX_SUMS_4(i + 1), ATTNX_SUMS_4(i + 2), ATTNX_SUMS_4(i + 3)
#define ATTNX_SUMS_32(i) ATTNX_SUMS_16(i), ATTNX_SUMS_16(i + 4)
#define ATTNX_SUMS_40(i) ATTNX_SUMS_32(i), ATTNX_SUMS_4(i + 8), ATTNX_SUMS_4(i + 9)
#define ATTNX_SUMS_64(i) ATTNX_SUMS_32(i), ATTNX_SUMS_32(i + 8)
#define ATTNX_SUMS_128(i) ATTNX_SUMS_64(i), ATTNX_SUMS_64(i + 16)

// This computes c = A B, or c += A B where `add`. An operand in shared memory is transposed where its rows, of 64
// features, are those of k. O0 and on are the numbers of the asm operands behind kColumns / 2 sums.
#define ATTNX_PRODUCTS(kColumns, kSums, TYPE, INPUT, O0, O1, O2, O3, O4, O5, O6)                                   \
  template <bool kTransposedA, bool kTransposedB>                                                                  \
  __device__ __forceinline__ void multiply_shared(float (&c)[kColumns / 8][4], std::uint64_t a, std::uint64_t b,   \
                                                  bool add, INPUT) {                                               \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " O2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kColumns    \
                 "k16.f32." TYPE "." TYPE " {" ATTNX_REGISTERS_##kSums "}, " O0 ", " O1 ", add, 1, 1, " O3 ", " O4 \
                                                                       ";\n}"                                      \
                 : ATTNX_SUMS_##kSums(0)                                                                           \
                 : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTransposedA)), "n"(int(kTransposedB)));                 \
  }                                                                                                                \
  template <bool kTransposedB>                                                                                     \
  __device__ __forceinline__ void multiply_registers(float (&c)[kColumns / 8][4], const std::uint32_t (&a)[4],     \
                                                     std::uint64_t b, bool add, INPUT) {                           \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " O5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kColumns    \
                 "k16.f32." TYPE "." TYPE " {" ATTNX_REGISTERS_##kSums "}, {" O0 ", " O1 ", " O2 ", " O3 "}, " O4  \
                                                                       ", add, 1, 1, " O6 ";\n}"                   \
                 : ATTNX_SUMS_##kSums(0)                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kTransposedB)));     \
  }

ATTNX_PRODUCTS(64, 32, "bf16", __nv_bfloat16, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
ATTNX_PRODUCTS(80, 40, "bf16", __nv_bfloat16, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
ATTNX_PRODUCTS(128, 64, "bf16", __nv_bfloat16, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
ATTNX_PRODUCTS(256, 128, "bf16", __nv_bfloat16, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
ATTNX_PRODUCTS(64, 32, "f16", __half, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
ATTNX_PRODUCTS(80, 40, "f16", __half, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
ATTNX_PRODUCTS(128, 64, "f16", __half, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
ATTNX_PRODUCTS(256, 128, "f16", __half, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef ATTNX_PRODUCTS
#undef ATTNX_SUMS_128
#undef ATTNX_SUMS_64
#undef ATTNX_SUMS_40
#undef ATTNX_SUMS_32
#undef ATTNX_SUMS_16
#undef ATTNX_SUMS_4
#undef ATTNX_REGISTERS_128
#undef ATTNX_REGISTERS_64
#undef ATTNX_REGISTERS_40
#undef ATTNX_REGISTERS_32
#undef ATTNX_10

}  // namespace attnx::cuda
