// Left operands in registers, and the innermost sums of the fp32 products. Used by tile/product.h.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/tf32.h"

namespace hstu_ops::cuda {

// An accumulator tile rounded to T and kept in registers as the left operand of the next product.
template <class T, int kM, int kN>
struct Fragment {
  uint32_t x[kM][kN / 2][4];

  Fragment() = default;
  __device__ __forceinline__ explicit Fragment(const Accumulator<kM, kN>& a) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int k = 0; k < kN / 2; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          x[m][k][e] = pack(a.x[m][2 * k + e / 2][e % 2 * 2], a.x[m][2 * k + e / 2][e % 2 * 2 + 1], T{});
  }
};

template <int kM, int kN>
struct Fragment<Tf32, kM, kN> {
  uint32_t x[kM][kN][4];

  Fragment() = default;
  // Even columns first: see product_tf32.h.
  __device__ __forceinline__ explicit Fragment(const Accumulator<kM, kN>& a) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = ptx::round_to_tf32(a.x[m][n][e % 2 * 2 + e / 2]);
  }
};

template <int kM, int kN>
struct Fragment<float, kM, kN> {
  float x[kM][kN][4];

  Fragment() = default;
  __device__ __forceinline__ explicit Fragment(const Accumulator<kM, kN>& a) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = a.x[m][n][e];
  }
};

// Steps of K for fp32, summed up before they are added: a[m][h][k] is this lane's rows of the left operand.
template <int kM, int kN, int kK, class TileB>
__device__ __forceinline__ void add_short_sums(Accumulator<kM, kN>& acc, const float (&a)[kM][2][kK], const TileB& b,
                                               int row_b, int col_b) {
  uint32_t start[kK];  // of a lane's columns in each of the rows
#pragma unroll
  for (int k = 0; k < kK; ++k) start[k] = b.at(row_b + k, (col_b + lane_col()) / 4) + lane_col() % 4 * 4;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    float2 sum[kM][2] = {};
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      const float2 fb =
          ptx::ld_shared_v2((start[k] ^ ((2 * n & TileB::kSwizzled) << 4)) + ((2 * n & ~TileB::kSwizzled) << 4));
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sum[m][h].x = fmaf(a[m][h][k], fb.x, sum[m][h].x);
          sum[m][h].y = fmaf(a[m][h][k], fb.y, sum[m][h].y);
        }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        acc.x[m][n][2 * h] += sum[m][h].x;
        acc.x[m][n][2 * h + 1] += sum[m][h].y;
      }
  }
}

}  // namespace hstu_ops::cuda
