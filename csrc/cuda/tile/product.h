// Matrix products of one warp on tiles in shared memory: tensor cores for 16-bit types and TF32, FFMA for fp32. The
// layouts of the operands are known here and in product_tf32.h alone. K is the summed dimension.
#pragma once

#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"
#include "cuda/tile/fragment.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/product_tf32.h"

namespace hstu_ops::cuda {

// One step of 16, of TF32 8, along K with the right operand's 16 columns in fb.
template <class T, bool kFirst, int kM, int kN>
__device__ __forceinline__ void mma_step(Accumulator<kM, kN>& acc, int m, int n, const uint32_t (&fa)[4],
                                         const uint32_t (&fb)[4]) {
  if constexpr (std::is_same_v<T, Tf32>) {
    if (kFirst) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.x[m][n][e] = acc.x[m][n + 1][e] = 0.f;
    }
    ptx::mma_m16n8k8_tf32(acc.x[m][n], fa, fb[0], fb[1]);
    ptx::mma_m16n8k8_tf32(acc.x[m][n + 1], fa, fb[2], fb[3]);
  } else if constexpr (kFirst) {
    ptx::mma_m16n8k16_first(acc.x[m][n], fa, fb[0], fb[1], T{});
    ptx::mma_m16n8k16_first(acc.x[m][n + 1], fa, fb[2], fb[3], T{});
  } else {
    ptx::mma_m16n8k16(acc.x[m][n], fa, fb[0], fb[1], T{});
    ptx::mma_m16n8k16(acc.x[m][n + 1], fa, fb[2], fb[3], T{});
  }
}

// Rows of both operands run along K, with FFMA: see multiply_rows. Sums of 8 are added up, which keeps the rounding
// error of a long sum that of a short one.
template <int kK, int kM, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_rows_fp32(Accumulator<kM, kN>& acc, const TileA& a, int row_a, const TileB& b,
                                                   int row_b) {
  const int ra = row_a + lane_row(), rb = row_b + lane_col();
  acc.clear();
#pragma unroll 1
  for (int k = 0; k < kK / 4; k += 2) {
    float4 fa[kM][2][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) fa[m][i / 2][i % 2] = ptx::ld_shared_v4(a.at(ra + m * 16 + i / 2 * 8, k + i % 2));
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float4 fb[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) fb[i] = ptx::ld_shared_v4(b.at(rb + n * 8 + c, k + i));
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float x = 0.f;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              x = fmaf(fa[m][h][i].x, fb[i].x, x);
              x = fmaf(fa[m][h][i].y, fb[i].y, x);
              x = fmaf(fa[m][h][i].z, fb[i].z, x);
              x = fmaf(fa[m][h][i].w, fb[i].w, x);
            }
            acc.x[m][n][2 * h + c] += x;
          }
      }
  }
}

// Rows of both operands run along K: acc[i][j] = sum_k a[row_a + i][k] b[row_b + j][k].
template <class T, int kK, int kM, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_rows(Accumulator<kM, kN>& acc, const TileA& a, int row_a, const TileB& b,
                                              int row_b) {
  if constexpr (!std::is_same_v<T, float>) {
    const int lane = lane_id();
    const Cursor<TileA> ca(a, row_a + lane % 16, lane / 16);
    const Cursor<TileB> cb(b, row_b + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    constexpr int kSteps = kK * static_cast<int>(sizeof(T)) / 32;
    constexpr int kUnrolled = kSteps > 8 ? 4 : kSteps;  // more are too many addresses
    if (kUnrolled < kSteps) acc.clear();
#pragma unroll kUnrolled
    for (int k = 0; k < kSteps; ++k) {
      uint32_t fa[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::ldmatrix_x4(fa[m], ca.at(m * 16, k * 2));
        round_operand<T>(fa[m]);
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t fb[4];
        ptx::ldmatrix_x4(fb, cb.at(n * 8, k * 2));
        round_operand<T>(fb);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          if (kUnrolled == kSteps && k == 0) {
            mma_step<T, true>(acc, m, n, fa[m], fb);
          } else {
            mma_step<T, false>(acc, m, n, fa[m], fb);
          }
        }
      }
    }
  } else {
    multiply_rows_fp32<kK>(acc, a, row_a, b, row_b);
  }
}

struct Nothing {
  __device__ void operator()(int) const {}
};

// The left operand in registers, K rows of the right one: acc[i][j] += sum_k a[i][k] b[row_b + k][col_b + j]. After
// step k of 16 along K comes between(k), with 16-bit types.
template <class T, int kM, int kK, int kN, class TileB, class Between = Nothing>
__device__ __forceinline__ void multiply_fragment(Accumulator<kM, kN>& acc, const Fragment<T, kM, kK>& a,
                                                  const TileB& b, int row_b, int col_b, Between&& between = {}) {
  static_assert(kIs16Bit<T> || std::is_same_v<std::decay_t<Between>, Nothing>);
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
        for (int m = 0; m < kM; ++m) mma_step<T, false>(acc, m, n, a.x[m][k], fb);
      }
      between(k);
    }
  } else if constexpr (std::is_same_v<T, Tf32>) {
    multiply_fragment_tf32(acc, a, b, row_b, col_b);
  } else {
#pragma unroll
    for (int k = 0; k < kK; k += 2) {  // blocks of 8
      static_assert(kK % 2 == 0);
      float fa[kM][2][16];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 32; ++i)
          fa[m][i / 16][i % 16] = __shfl_sync(~0u, a.x[m][k + i % 16 / 8][i / 16 * 2 + i % 2], (lane & ~3) | i % 8 / 2);
      add_short_sums(acc, fa, b, row_b + k * 8, col_b);
    }
  }
}

// Rows of the left operand run along K, the right one has K rows: acc[i][j] += sum_k a[row_a + i][k] b[k][col_b + j].
// After step k of 16 along K comes between(k). first: where K begins in both, 0 or, with 16-bit types, a power of two
// that is at least kK.
template <class T, int kK, int kM, int kN, class TileA, class TileB, class Between = Nothing>
__device__ __forceinline__ void multiply_tiles(Accumulator<kM, kN>& acc, const TileA& a, int row_a, const TileB& b,
                                               int col_b, Between&& between = {}, int first = 0) {
  const int lane = lane_id();
  if constexpr (kIs16Bit<T>) {
    const Cursor<TileA> ca(a, row_a + lane % 16, first / 8 + lane / 16);
    const Cursor<TileB> cb(b, first + lane % 16, col_b / 8 + lane / 16);
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      uint32_t fa[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) ptx::ldmatrix_x4(fa[m], ca.at(m * 16, k * 2));
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t fb[4];
        ptx::ldmatrix_x4_trans(fb, cb.at(k * 16, n));
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_step<T, false>(acc, m, n, fa[m], fb);
      }
      between(k);
    }
  } else if constexpr (std::is_same_v<T, Tf32>) {
    multiply_tiles_tf32<kK>(acc, a, row_a, b, col_b);
  } else {
#pragma unroll 1
    for (int k = 0; k < kK / 16; ++k) {
      float fa[kM][2][16];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float4 x = ptx::ld_shared_v4(a.at(row_a + m * 16 + i / 4 * 8 + lane_row(), k * 4 + i % 4));
          float* to = &fa[m][i / 4][i % 4 * 4];
          to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        }
      add_short_sums(acc, fa, b, k * 16, col_b);
      between(k);
    }
  }
}

// K rows of both operands: acc[i][j] = sum_k a[k][col_a + i] b[k][col_b + j].
template <class T, int kK, int kM, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_columns(Accumulator<kM, kN>& acc, const TileA& a, int col_a, const TileB& b,
                                                 int col_b) {
  const int lane = lane_id();
  if constexpr (kIs16Bit<T>) {
    const int row_a = lane / 16 * 8 + lane % 8;
    const Cursor<TileB> cb(b, lane % 16, col_b / 8 + lane / 16);
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      uint32_t fa[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
        ptx::ldmatrix_x4_trans(fa[m], a.at(k * 16 + row_a, col_a / 8 + m * 2 + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t fb[4];
        ptx::ldmatrix_x4_trans(fb, cb.at(k * 16, n));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          if (k == 0) {
            mma_step<T, true>(acc, m, n, fa[m], fb);
          } else {
            mma_step<T, false>(acc, m, n, fa[m], fb);
          }
        }
      }
    }
  } else if constexpr (std::is_same_v<T, Tf32>) {
    multiply_columns_tf32<kK>(acc, a, col_a, b, col_b);
  } else {
    acc.clear();
#pragma unroll 1
    for (int k8 = 0; k8 < kK / 8; ++k8) {
      float fa[kM][2][8];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const int col = col_a + m * 16 + h * 8 + lane_row();
            fa[m][h][k] = ptx::ld_shared(a.at(k8 * 8 + k, col / 4) + col % 4 * 4);
          }
      add_short_sums(acc, fa, b, k8 * 8, col_b);
    }
  }
}

}  // namespace hstu_ops::cuda
