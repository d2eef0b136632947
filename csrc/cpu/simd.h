// Vectors of the instruction set this file is compiled for, in the compiler's portable vector extensions, and the few
// functions on them that attention needs. Included only by code compiled once per instruction set (namespace HSTU_ISA);
// nothing here may call a std template: the linker could keep another instruction set's copy of it.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

#if defined(__AVX512F__)
#define HSTU_VECTOR_BYTES 64
#elif defined(__AVX__)
#define HSTU_VECTOR_BYTES 32
#else
#define HSTU_VECTOR_BYTES 16
#endif

#define HSTU_INLINE inline __attribute__((always_inline))
#define HSTU_UNROLL _Pragma("GCC unroll 16")

namespace hstu_ops {
namespace cpu {
namespace HSTU_ISA {
namespace {

template <class C>
struct Simd;

template <>
struct Simd<float> {
  using Int = int32_t;
  typedef float V __attribute__((vector_size(HSTU_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(HSTU_VECTOR_BYTES), aligned(4), may_alias));
  typedef Int I __attribute__((vector_size(HSTU_VECTOR_BYTES)));
  typedef Int UnalignedInt __attribute__((vector_size(HSTU_VECTOR_BYTES), aligned(4), may_alias));
  static constexpr int kExponentBits = 23, kExponentBias = 127;
  static constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float kMaxExp = 87.f;
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
};

template <>
struct Simd<double> {
  using Int = int64_t;
  typedef double V __attribute__((vector_size(HSTU_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(HSTU_VECTOR_BYTES), aligned(8), may_alias));
  typedef Int I __attribute__((vector_size(HSTU_VECTOR_BYTES)));
  typedef Int UnalignedInt __attribute__((vector_size(HSTU_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int kExponentBits = 52, kExponentBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kMaxExp = 708.0;
  static constexpr double kLn2Hi = 0.693147180369123816490, kLn2Lo = 1.90821492927058770002e-10;
};

template <class C>
using Vec = typename Simd<C>::V;
template <class C>
using IntVec = typename Simd<C>::I;
template <class C>
constexpr int kLanes = HSTU_VECTOR_BYTES / sizeof(C);

template <class C>
HSTU_INLINE Vec<C> load(const C* p) {
  return *reinterpret_cast<const typename Simd<C>::Unaligned*>(p);
}
template <class C>
HSTU_INLINE IntVec<C> load_int(const typename Simd<C>::Int* p) {
  return *reinterpret_cast<const typename Simd<C>::UnalignedInt*>(p);
}
template <class C>
HSTU_INLINE void store(C* p, Vec<C> v) {
  *reinterpret_cast<typename Simd<C>::Unaligned*>(p) = v;
}
// x - 0 and not 0 + x: the sum would be an instruction of its own (it turns -0 into 0).
template <class C>
HSTU_INLINE Vec<C> broadcast(C x) {
  return x - Vec<C>{};
}
template <class C>
HSTU_INLINE IntVec<C> broadcast_int(typename Simd<C>::Int x) {
  return x - IntVec<C>{};
}
template <class C>
HSTU_INLINE Vec<C> select(IntVec<C> mask, Vec<C> yes, Vec<C> no) {
  return mask ? yes : no;
}

// 0, 1, 2, ...
template <class C>
HSTU_INLINE IntVec<C> iota() {
  IntVec<C> v;
  HSTU_UNROLL
  for (int i = 0; i < kLanes<C>; ++i) v[i] = i;
  return v;
}

// e^f for |f| <= ln(2) / 2: Taylor polynomials, shortened for float by a minimax fit.
HSTU_INLINE Vec<float> exp_reduced(Vec<float> f) {
  Vec<float> p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  return p * (f * f) + (f + 1.f);
}
HSTU_INLINE Vec<double> exp_reduced(Vec<double> f) {
  constexpr double kInverseFactorial[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  Vec<double> p = broadcast(kInverseFactorial[0]);
  HSTU_UNROLL
  for (int i = 1; i < 14; ++i) p = p * f + kInverseFactorial[i];
  return p;
}

// e^x, |x| clamped to kMaxExp; NaN stays NaN. Relative error 1.2e-7 (float), 3e-16 (double).
template <class C>
HSTU_INLINE Vec<C> exp(Vec<C> x) {
  using S = Simd<C>;
  x = x < -S::kMaxExp ? broadcast<C>(-S::kMaxExp) : x;
  x = x > S::kMaxExp ? broadcast<C>(S::kMaxExp) : x;
  const Vec<C> shifted = x * C(1.44269504088896340736) + S::kRound;
  const Vec<C> n = shifted - S::kRound;
  const Vec<C> f = (x - n * S::kLn2Hi) - n * S::kLn2Lo;
  const IntVec<C> exponent = (IntVec<C>)shifted << S::kExponentBits;  // the rounding constant's own bits shift out
  return (Vec<C>)((IntVec<C>)exp_reduced(f) + exponent);
}

template <class C>
HSTU_INLINE Vec<C> sigmoid(Vec<C> x) {
  const Vec<C> s = 1 / (1 + exp<C>(-x));
  return x < -Simd<C>::kMaxExp ? broadcast<C>(0) : s;  // times the lowest number, too, it is 0
}

}  // namespace
}  // namespace HSTU_ISA
}  // namespace cpu
}  // namespace hstu_ops
