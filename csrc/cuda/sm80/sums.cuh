// dQ from the accumulators of a warp to fp32 sums in global memory.
//
// The sums are [heads][padded dim / columns][total_q][columns], columns being those of dQ that a warp has: what it adds
// of a tile lies together. From sm_90 on a lane's four values of 16 columns lie side by side, so that one reduction
// takes them; before, a row's columns are in order.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"

namespace hstu_ops::cuda::sm80 {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kWideAdds = true;
#else
constexpr bool kWideAdds = false;
#endif

__host__ __device__ inline int64_t sum_row(int64_t total, int parts, int columns, int head, int part, int64_t row) {
  return ((static_cast<int64_t>(head) * parts + part) * total + row) * columns;
}

// Columns [0, 16) of `sums`, in order.
__device__ __forceinline__ void read_sums(const float* sums, float (&x)[16]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 y = reinterpret_cast<const float4*>(sums)[i];
    const int low = kWideAdds ? 2 * i : 4 * i, high = kWideAdds ? 8 + 2 * i : 4 * i + 2;
    x[low] = y.x, x[low + 1] = y.y, x[high] = y.z, x[high + 1] = y.w;
  }
}

// Where a warp adds its rows of a tile, times factor; only the first `rows` exist.
template <int kColumns>
struct SumRows {
  float* to;
  int rows;
  float factor;

  // One of the kM * kN parts of dQ, the columns of which lie from `col` on.
  template <int kM, int kN>
  __device__ __forceinline__ void add(const Accumulator<kM, kN>& dq, int part, int col = 0) const {
    const int m = part / kN, h = part / (kN / 2) % 2, n = part % (kN / 2) * 2, row = m * 16 + h * 8 + lane_row();
    if (row >= rows) return;
    float* const start = to + col + row * kColumns + (kWideAdds ? 2 : 1) * lane_col();
    const auto value = [&](int i) { return dq.x[m][n + i / 2][2 * h + i % 2] * factor; };
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    ptx::red_add_v4(start + n * 8, value(0), value(1), value(2), value(3));
#else
    ptx::red_add_v2(start + n * 8, value(0), value(1));
    ptx::red_add_v2(start + n * 8 + 8, value(2), value(3));
#endif
  }
};

}  // namespace hstu_ops::cuda::sm80
