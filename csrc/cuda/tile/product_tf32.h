// What the products of product.h need where factors are rounded to TF32. ldmatrix hands out its 16 bytes a row as four
// floats just as well as eight halves, but does not transpose them: operands whose rows do not run along K are read one
// float at a time, rows 0 2 4 6 1 3 5 7 of each eight, which fall into different banks and are the order in which an
// accumulator is a left operand.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"
#include "cuda/tile/fragment.h"
#include "cuda/tile/layout.h"

namespace hstu_ops::cuda {

// An operand as the tensor core wants it; of 16-bit types it is already.
template <class T, int kCount>
__device__ __forceinline__ void round_operand(uint32_t (&x)[kCount]) {
  if constexpr (std::is_same_v<T, Tf32>) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = ptx::round_to_tf32(__uint_as_float(x[i]));
  }
}

// One lane's part of a tile whose rows do not run along K.
template <class Tile>
struct Tf32Columns {
  uint32_t start[2];

  __device__ Tf32Columns(const Tile& tile, int row, int col) {
#pragma unroll
    for (int i = 0; i < 2; ++i) start[i] = tile.at(row + lane_col() + i, (col + lane_row()) / 4) + lane_row() % 4 * 4;
  }
  // Column lane / 4 of columns [8 * n, 8 * n + 8), two rows of [8 * k, 8 * k + 8).
  __device__ __forceinline__ void read(uint32_t (&x)[2], int k, int n) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      x[i] = __float_as_uint(ptx::ld_shared((start[i] ^ ((2 * n & Tile::kSwizzled) << 4)) +
                                            ((2 * n & ~Tile::kSwizzled) << 4) + k * 8 * Tile::kPitch));
    round_operand<Tf32>(x);
  }
};

// Eight steps of K: acc += a b.
template <int kM, int kN, class TileB>
__device__ __forceinline__ void add_products_tf32(Accumulator<kM, kN>& acc, const uint32_t (&fa)[kM][4],
                                                  const Tf32Columns<TileB>& b, int k) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    uint32_t fb[2];
    b.read(fb, k, n);
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::mma_m16n8k8_tf32(acc.x[m][n], fa[m], fb[0], fb[1]);
  }
}

template <int kM, int kK, int kN, class TileB>
__device__ __forceinline__ void multiply_fragment_tf32(Accumulator<kM, kN>& acc, const Fragment<Tf32, kM, kK>& a,
                                                       const TileB& b, int row_b, int col_b) {
  const Tf32Columns<TileB> cb(b, row_b, col_b);
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    uint32_t fa[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) fa[m][e] = a.x[m][k][e];
    add_products_tf32(acc, fa, cb, k);
  }
}

template <int kK, int kM, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_tiles_tf32(Accumulator<kM, kN>& acc, const TileA& a, int row_a, const TileB& b,
                                                    int col_b) {
  const Tf32Columns<TileB> cb(b, 0, col_b);
#pragma unroll
  for (int k = 0; k < kK / 8; ++k) {
    uint32_t fa[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_a + m * 16 + h * 8 + lane_row();
        const float2 x = ptx::ld_shared_v2(a.at(row, k * 2 + lane_col() / 4) + lane_col() % 4 * 4);
        fa[m][h] = __float_as_uint(x.x), fa[m][2 + h] = __float_as_uint(x.y);
      }
      round_operand<Tf32>(fa[m]);
    }
    add_products_tf32(acc, fa, cb, k);
  }
}

template <int kK, int kM, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_columns_tf32(Accumulator<kM, kN>& acc, const TileA& a, int col_a,
                                                      const TileB& b, int col_b) {
  const Tf32Columns<TileA> ca(a, 0, col_a);
  const Tf32Columns<TileB> cb(b, 0, col_b);
  acc.clear();
#pragma unroll
  for (int k = 0; k < kK / 8; ++k) {
    uint32_t fa[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t x[2];
        ca.read(x, k, 2 * m + h);
        fa[m][h] = x[0], fa[m][2 + h] = x[1];
      }
    add_products_tf32(acc, fa, cb, k);
  }
}

}  // namespace hstu_ops::cuda
