// From u, a product's share of the argument of SiLU, to p = silu and to twice or once its derivative. 16-bit types take
// u = x / 2 and p = u + u tanh(u) with the hardware's tanh, fp32 takes u = x and an exact sigmoid, TF32 one to a few
// units of float32.
#pragma once

#include "core/silu.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/tf32.h"

namespace hstu_ops::cuda {

template <class T>
struct Score {
  static constexpr float kArgument = kIs16Bit<T> ? 0.5f : 1.f;  // u = kArgument * x
  static constexpr float kSlope = kIs16Bit<T> ? 0.5f : 1.f;     // silu'(x) = kSlope * slope

  template <int kM, int kN>
  __device__ static __forceinline__ void activate(Accumulator<kM, kN>& s) {
    s.each([](float& x, int, int) { x = value(x); });
  }
  // s: u in, p out; d: dp in, dp * slope out.
  template <int kM, int kN>
  __device__ static __forceinline__ void differentiate(Accumulator<kM, kN>& s, Accumulator<kM, kN>& d) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float u = s.x[m][n][e];
          if constexpr (kIs16Bit<T>) {
            const float t = ptx::tanh_approx(u), p = fmaf(u, t, u);
            const float g = fmaf(-p, t, p) + t;  // 2 silu' - 1
            s.x[m][n][e] = p;
            d.x[m][n][e] = fmaf(d.x[m][n][e], g, d.x[m][n][e]);
          } else {
            const float sigmoid = sigmoid_of(u);
            s.x[m][n][e] = silu(u, sigmoid);
            d.x[m][n][e] *= silu_grad(u, sigmoid);
          }
        }
  }
  // s: u in, slope - 1 out.
  template <int kM, int kN>
  __device__ static __forceinline__ void slope(Accumulator<kM, kN>& s) {
    static_assert(kIs16Bit<T>);
    s.each([](float& x, int, int) {
      const float t = ptx::tanh_approx(x);
      x = fmaf(x, fmaf(-t, t, 1.f), t);
    });
  }

 private:
  __device__ static __forceinline__ float value(float u) {
    if constexpr (kIs16Bit<T>) {
      return fmaf(u, ptx::tanh_approx(u), u);
    } else if constexpr (std::is_same_v<T, Tf32>) {
      return silu(u, sigmoid_of(u));
    } else {
      return u / (1.f + expf(-u));  // one rounding less than a product with the sigmoid
    }
  }
  __device__ static __forceinline__ float sigmoid_of(float u) {
    if constexpr (std::is_same_v<T, Tf32>)
      return ptx::rcp_approx(1.f + ptx::ex2_approx(-1.4426950408889634f * u));
    else
      return 1.f / (1.f + expf(-u));
  }
};

// Factor of the output rows of one sequence.
struct RowScale {
  const float* values;  // of the sequence's first query row; absent: value holds for all rows
  float value;

  __device__ RowScale(const ScaleParams& p, int sequence, int64_t first_row) {
    const float* data = static_cast<const float*>(p.values);
    values = data && p.per_row ? data + first_row : nullptr;
    value = data && !p.per_row ? data[sequence] : static_cast<float>(p.value);
  }
  __device__ float operator()(int row) const { return values ? values[row] : value; }
};

}  // namespace hstu_ops::cuda
