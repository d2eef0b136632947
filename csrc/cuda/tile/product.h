// Matrix products of one warp on tiles in shared memory: tensor cores for 16-bit types, FFMA for fp32. The layouts of
// the operands are known here and nowhere else. K is the summed dimension.
#pragma once

#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/layout.h"

namespace hstu_ops::cuda {

// An accumulator tile rounded to T and kept in registers as the left operand of the next product.
template <class T, int kM, int kN>
struct Fragment {
  uint32_t x[kM][kN / 2][4];

  __device__ __forceinline__ explicit Fragment(const Accumulator<kM, kN>& a) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int k = 0; k < kN / 2; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][k][e] = pack(a.x[m][2 * k + e / 2][e % 2 * 2], a.x[m][2 * k + e / 2][e % 2 * 2 + 1], T{});
  }
};

template <int kM, int kN>
struct Fragment<float, kM, kN> {
  float x[kM][kN][4];

  __device__ __forceinline__ explicit Fragment(const Accumulator<kM, kN>& a) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = a.x[m][n][e];
  }
};

// ---- 16-bit ----

// Rows of both operands run along K: acc[i][j] += sum_k a[row_a + i][k] b[row_b + j][k].
template <class T, int kK, int kM, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_rows(Accumulator<kM, kN>& acc, const TileA& a, int row_a, const TileB& b, int row_b) {
  if constexpr (kIs16Bit<T>) {
    const int lane = lane_id();
    const Cursor<TileA> ca(a, row_a + lane % 16, lane / 16);
    const Cursor<TileB> cb(b, row_b + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      uint32_t fa[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(fa[m], ca.at(m * 16, k * 2));
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t fb[4];
        ptx::ldmatrix_x4(fb, cb.at(n * 8, k * 2));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma_m16n8k16(acc.x[m][n], fa[m], fb[0], fb[1], T{});
          ptx::mma_m16n8k16(acc.x[m][n + 1], fa[m], fb[2], fb[3], T{});
        }
      }
    }
  } else {
    const int ra = row_a + lane_row(), rb = row_b + lane_col();
#pragma unroll 1
    for (int k = 0; k < kK / 4; ++k) {
      float4 fa[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) fa[m][h] = ptx::ld_shared_v4(a.at(ra + m * 16 + h * 8, k));
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float4 fb = ptx::ld_shared_v4(b.at(rb + n * 8 + c, k));
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float& x = acc.x[m][n][2 * h + c];
              x = fmaf(fa[m][h].x, fb.x, x);
              x = fmaf(fa[m][h].y, fb.y, x);
              x = fmaf(fa[m][h].z, fb.z, x);
              x = fmaf(fa[m][h].w, fb.w, x);
            }
        }
    }
  }
}

// The left operand in registers, K rows of the right one: acc[i][j] += sum_k a[i][k] b[row_b + k][col_b + j].
template <class T, int kM, int kK, int kN, class TileB>
__device__ __forceinline__ void multiply_fragment(Accumulator<kM, kN>& acc, const Fragment<T, kM, kK>& a, const TileB& b, int row_b,
                                                  int col_b) {
  const int lane = lane_id();
  if constexpr (kIs16Bit<T>) {
    const Cursor<TileB> cb(b, row_b + lane % 16, col_b / 8 + lane / 16);
#pragma unroll
    for (int k = 0; k < kK / 2; ++k) {
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t fb[4];
        ptx::ldmatrix_x4_trans(fb, cb.at(k * 16, n));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma_m16n8k16(acc.x[m][n], a.x[m][k], fb[0], fb[1], T{});
          ptx::mma_m16n8k16(acc.x[m][n + 1], a.x[m][k], fb[2], fb[3], T{});
        }
      }
    }
  } else {
#pragma unroll
    for (int k8 = 0; k8 < kK; ++k8) {
#pragma unroll 1
      for (int k = 0; k < 8; ++k) {
        float fa[kM][2];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            fa[m][h] = __shfl_sync(~0u, k % 2 ? a.x[m][k8][2 * h + 1] : a.x[m][k8][2 * h], (lane & ~3) | k / 2);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const int col = col_b + n * 8 + lane_col();
          const float2 fb = ptx::ld_shared_v2(b.at(row_b + k8 * 8 + k, col / 4) + col % 4 * 4);
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              acc.x[m][n][2 * h] = fmaf(fa[m][h], fb.x, acc.x[m][n][2 * h]);
              acc.x[m][n][2 * h + 1] = fmaf(fa[m][h], fb.y, acc.x[m][n][2 * h + 1]);
            }
        }
      }
    }
  }
}

// K rows of both operands: acc[i][j] += sum_k a[k][col_a + i] b[k][col_b + j].
template <class T, int kK, int kM, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_columns(Accumulator<kM, kN>& acc, const TileA& a, int col_a, const TileB& b, int col_b) {
  const int lane = lane_id();
  if constexpr (kIs16Bit<T>) {
    const int row_a = lane / 16 * 8 + lane % 8;
    const Cursor<TileB> cb(b, lane % 16, col_b / 8 + lane / 16);
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      uint32_t fa[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4_trans(fa[m], a.at(k * 16 + row_a, col_a / 8 + m * 2 + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t fb[4];
        ptx::ldmatrix_x4_trans(fb, cb.at(k * 16, n));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ptx::mma_m16n8k16(acc.x[m][n], fa[m], fb[0], fb[1], T{});
          ptx::mma_m16n8k16(acc.x[m][n + 1], fa[m], fb[2], fb[3], T{});
        }
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < kK; ++k) {
      float fa[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int col = col_a + m * 16 + h * 8 + lane_row();
          fa[m][h] = ptx::ld_shared(a.at(k, col / 4) + col % 4 * 4);
        }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int col = col_b + n * 8 + lane_col();
        const float2 fb = ptx::ld_shared_v2(b.at(k, col / 4) + col % 4 * 4);
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            acc.x[m][n][2 * h] = fmaf(fa[m][h], fb.x, acc.x[m][n][2 * h]);
            acc.x[m][n][2 * h + 1] = fmaf(fa[m][h], fb.y, acc.x[m][n][2 * h + 1]);
          }
      }
    }
  }
}

}  // namespace hstu_ops::cuda
