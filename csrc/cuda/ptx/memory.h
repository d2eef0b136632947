// Shared-memory access by 32-bit address, loads, stores and reductions in global memory, acquiring loads and a
// releasing store.
#pragma once

#include <cstdint>

namespace hstu_ops::ptx {

// threadIdx.x, read again each time: what a rarely used path derives from it is not kept in registers.
__device__ __forceinline__ int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// The same value as one the compiler does not know: what is derived from it is worked out again, not kept in registers.
__device__ __forceinline__ unsigned again(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A value that is the same in all lanes: branches on it keep a warp together, which the compiler cannot know otherwise.
// Worked out here, not where it is used.
__device__ __forceinline__ int uniform(int x) {
  int y;
  asm volatile("shfl.sync.idx.b32 %0, %1, 0, 0x1f, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
}

// As an instruction that is not repeated: left to the compiler, an address may be computed again at each use.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  uint32_t address;
  asm("{\n\t.reg .u64 x;\n\tcvta.to.shared.u64 x, %1;\n\tcvt.u32.u64 %0, x;\n\t}" : "=r"(address) : "l"(shared));
  return address;
}

__device__ __forceinline__ void st_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ void st_shared(uint32_t address, uint16_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
}
__device__ __forceinline__ void st_shared(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}

__device__ __forceinline__ void st_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ void st_shared(uint32_t address, int2 x) {
  asm volatile("st.shared.v2.s32 [%0], {%1,%2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}

__device__ __forceinline__ void st_shared(uint32_t address, uint2 x) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}

__device__ __forceinline__ void st_shared(uint32_t address, float4 x) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// Without a branch.
__device__ __forceinline__ void st_shared_if(bool there, uint32_t address, float x) {
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\t@p st.shared.f32 [%0], %1;\n\t}" ::"r"(address), "f"(x),
               "r"(static_cast<int>(there))
               : "memory");
}

__device__ __forceinline__ float ld_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ float2 ld_shared_v2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ float4 ld_shared_v4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ uint4 ld_shared_u4(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ int ld_shared_int(uint32_t address) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ int ld_shared_u16(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ int2 ld_shared_int_v2(uint32_t address) {
  int2 x;
  asm volatile("ld.shared.v2.s32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}

// A word of 64 bits is two of 32, the lower one first.
__device__ __forceinline__ int64_t join(uint32_t low, uint32_t high) {
  return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
}
__device__ __forceinline__ int64_t ld_shared_int64(uint32_t address) {
  const int2 x = ld_shared_int_v2(address);
  return join(x.x, x.y);
}
__device__ __forceinline__ void st_shared_int64(uint32_t address, int64_t x) {
  st_shared(address, make_int2(static_cast<int>(x), static_cast<int>(x >> 32)));
}

__device__ __forceinline__ void red_shared_add(uint32_t address, int x) {
  asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// Does nothing for x = 0.
__device__ __forceinline__ void red_shared_add_nonzero(uint32_t address, int x) {
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %1, 0;\n\t@p red.shared.add.s32 [%0], %1;\n\t}" ::"r"(address),
               "r"(x)
               : "memory");
}

__device__ __forceinline__ void red_shared_min(uint32_t address, int x) {
  asm volatile("red.shared.min.s32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void red_shared_or(uint32_t address, unsigned x) {
  asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// Memory that this kernel has written, before a barrier.
__device__ __forceinline__ int ld_global_int(const void* p) {
  int x;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
// Past the L1: other processors have written it.
__device__ __forceinline__ float4 ld_global_v4(const float* p) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(p)
               : "memory");
  return x;
}
__device__ __forceinline__ void st_global(void* to, uint32_t x) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// `to` on 16 bytes. A store through uint4* may become four of 4 bytes.
__device__ __forceinline__ void st_global(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// The same if it is there, without a branch.
__device__ __forceinline__ void st_global_if(bool there, void* to, uint4 x) {
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %5, 0;\n\t@p st.global.v4.b32 [%0], {%1,%2,%3,%4};\n\t}" ::"l"(to),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(static_cast<int>(there))
               : "memory");
}

// Read-only memory; not moved across other such loads, which bounds the registers of many.
__device__ __forceinline__ float ld_global(const float* p) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(p));
  return x;
}

// The same of those that are there, without a branch; 0 of others. A pair is on 8 bytes.
__device__ __forceinline__ float ld_global_if(bool there, const float* p) {
  float x;
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b32 %0, 0;\n\t@p ld.global.nc.f32 %0, [%1];\n\t}"
               : "=&f"(x)
               : "l"(p), "r"(static_cast<int>(there)));
  return x;
}
__device__ __forceinline__ float2 ld_global_pair_if(bool there, const float* p) {
  float2 x;
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %3, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\t"
      "@p ld.global.nc.v2.f32 {%0,%1}, [%2];\n\t}"
      : "=&f"(x.x), "=&f"(x.y)
      : "l"(p), "r"(static_cast<int>(there)));
  return x;
}

__device__ __forceinline__ void red_add(float* p, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
}
// p[i] += the i-th argument.
__device__ __forceinline__ void red_add_v2(float* p, float x, float y) {
  asm volatile("red.global.add.f32 [%0], %1;\n\tred.global.add.f32 [%0 + 4], %2;" ::"l"(p), "f"(x), "f"(y) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void red_add_v4(float* p, float x, float y, float z, float w) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
#endif

__device__ __forceinline__ void red_add(unsigned long long* p, unsigned long long x) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}

__device__ __forceinline__ unsigned ld_acquire(const unsigned* p) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ unsigned long long ld_acquire(const unsigned long long* p) {
  unsigned long long x;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ void red_release(unsigned* p, unsigned x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ __forceinline__ void red_release_max(unsigned* p, unsigned x) {
  asm volatile("red.release.gpu.global.max.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ __forceinline__ void st_release(unsigned long long* p, unsigned long long x) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}

}  // namespace hstu_ops::ptx
