// Asynchronous matrix products of a warpgroup: D[64][N] (+)= A[64][16] B[16][N], D in registers.
//
// Operands in shared memory are 128-byte-swizzled panels of 64 elements a row (see Descriptor). The accumulator's
// element 4 j + e of a lane is row lane / 4 + 8 (e / 2) of its warp's 16 rows, column 8 j + lane % 4 * 2 + e % 2: the
// layout of tile/layout.h's Accumulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace hstu_ops::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers of products may be read from here on (after a wait), or are complete (before a fence): keeps the compiler
// from moving what computes with them across.
template <int kCount>
__device__ __forceinline__ void wgmma_settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void wgmma_settle(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Where an operand starts. 16-byte units, eight-row groups 1024 bytes apart; panels start on 1024 bytes.
// Rows along M or N, columns along K: the next 16 of K are 32 bytes on; `panel_bytes` is unused.
// Rows along K, columns along M or N: the next 16 of K are 2048 bytes on, the next 64 columns `panel_bytes`.
class Descriptor {
 public:
  // The address is the same in all threads; the shuffle tells the compiler so, which then keeps descriptors out of the
  // registers that accumulators need.
  __device__ explicit Descriptor(uint32_t shared, uint32_t panel_bytes = 16)
      : low_(__shfl_sync(~0u, (shared & 0x3ffff) >> 4 | panel_bytes >> 4 << 16, 0)) {}

  // Of another operand, `bytes` further on.
  __device__ __forceinline__ Descriptor moved(int bytes, int panel_bytes = 16) const {
    Descriptor d = *this;
    d.low_ += (bytes >> 4) + (((panel_bytes >> 4) - 1) << 16);
    return d;
  }

  __device__ __forceinline__ uint64_t at(int bytes) const {
    constexpr uint32_t kSwizzle128 = 1u << 30, kGroup = 1024 >> 4;
    return static_cast<uint64_t>(kSwizzle128 | kGroup) << 32 | (low_ + (bytes >> 4));
  }

 private:
  uint32_t low_;
};

template <int kColumns, class T>
struct Wgmma;

#define HSTU_ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HSTU_ACC16(i) HSTU_ACC4(i), HSTU_ACC4(i + 4), HSTU_ACC4(i + 8), HSTU_ACC4(i + 12)
#define HSTU_ACC32 HSTU_ACC16(0), HSTU_ACC16(16)
#define HSTU_ACC64 HSTU_ACC32, HSTU_ACC16(32), HSTU_ACC16(48)
#define HSTU_ACC128 HSTU_ACC64, HSTU_ACC16(64), HSTU_ACC16(80), HSTU_ACC16(96), HSTU_ACC16(112)

#define HSTU_REGS32                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HSTU_REGS64                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HSTU_REGS128                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// multiply_rows: both operands from shared memory, rows along M and N. multiply_columns: the same with rows along K.
// multiply_fragment: A from registers, B's rows along K. multiply_fragment_rows: A from registers, B's rows along N.
#define HSTU_WGMMA(kN, kRegs, T, kType, p0, p1, p2, p3, p4, p5)                                                       \
  template <>                                                                                                         \
  struct Wgmma<kN, T> {                                                                                               \
    __device__ static __forceinline__ void multiply_rows(float (&d)[kRegs], uint64_t a, uint64_t b, bool add) {       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN             \
                   "k16.f32." kType "." kType " {" HSTU_REGS##kRegs "}, %" #p0 ", %" #p1 ", p, 1, 1, 0, 0;\n}\n"      \
                   : HSTU_ACC##kRegs                                                                                  \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                     \
    }                                                                                                                 \
    __device__ static __forceinline__ void multiply_columns(float (&d)[kRegs], uint64_t a, uint64_t b, bool add) {    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN             \
                   "k16.f32." kType "." kType " {" HSTU_REGS##kRegs "}, %" #p0 ", %" #p1 ", p, 1, 1, 1, 1;\n}\n"      \
                   : HSTU_ACC##kRegs                                                                                  \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                     \
    }                                                                                                                 \
    __device__ static __forceinline__ void multiply_fragment(float (&d)[kRegs], const uint32_t (&a)[4], uint64_t b) { \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType   \
                   "." kType " {" HSTU_REGS##kRegs "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4               \
                                                   ", p, 1, 1, 1;\n}\n"                                               \
                   : HSTU_ACC##kRegs                                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                             \
    }                                                                                                                 \
    __device__ static __forceinline__ void multiply_fragment_rows(float (&d)[kRegs], const uint32_t (&a)[4],          \
                                                                  uint64_t b, bool add) {                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN             \
                   "k16.f32." kType "." kType " {" HSTU_REGS##kRegs "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3         \
                                                                    "}, %" #p4 ", p, 1, 1, 0;\n}\n"                   \
                   : HSTU_ACC##kRegs                                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                 \
    }                                                                                                                 \
  };

HSTU_WGMMA(64, 32, __half, "f16", 32, 33, 34, 35, 36, 37)
HSTU_WGMMA(64, 32, __nv_bfloat16, "bf16", 32, 33, 34, 35, 36, 37)
HSTU_WGMMA(128, 64, __half, "f16", 64, 65, 66, 67, 68, 69)
HSTU_WGMMA(128, 64, __nv_bfloat16, "bf16", 64, 65, 66, 67, 68, 69)
HSTU_WGMMA(256, 128, __half, "f16", 128, 129, 130, 131, 132, 133)
HSTU_WGMMA(256, 128, __nv_bfloat16, "bf16", 128, 129, 130, 131, 132, 133)

}  // namespace hstu_ops::ptx
