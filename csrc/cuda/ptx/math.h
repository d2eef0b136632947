// Functions of one instruction: the hardware's approximations, sums of pairs, and bytes of a word.
#pragma once

#include <cstdint>

namespace hstu_ops::ptx {

// Absolute error below 2^-10.9.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x and 1 / x, relative error of a few units of float32; what is below 2^-126 becomes 0.
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float x;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Two sums of bfloat16; a b + c for pairs of float16.
__device__ __forceinline__ uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
#endif

// Bits [begin, begin + count) of a word; what lies past it is left out.
__device__ __forceinline__ uint32_t bit_mask(uint32_t begin, uint32_t count) {
  uint32_t x;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(x) : "r"(begin), "r"(count));
  return x;
}

// Each half of a word filled with its own highest bit; or the word with that of its lower or upper half.
__device__ __forceinline__ uint32_t signs_of_halves(uint32_t x) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ uint32_t sign_of_half(uint32_t x, bool upper) {
  return static_cast<uint32_t>(static_cast<int32_t>(upper ? x : x << 16) >> 31);
}

// Two halves of 16 bits, each all ones where byte kHigh (or kLow) of x has its highest bit set, else zeros.
template <int kHigh, int kLow>
__device__ __forceinline__ uint32_t spread_signs(uint32_t x) {
  constexpr int kSign = 8, kSelect = (kHigh + kSign) * 0x1100 + (kLow + kSign) * 0x11;
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "n"(kSelect));
  return y;
}

}  // namespace hstu_ops::ptx
