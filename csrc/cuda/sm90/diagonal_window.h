// Weights of the position term of a tile, by diagonal, in shared memory. Used by both directions and for gradients of
// the tables.
#pragma once

#include "core/mask.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/memory.h"

namespace hstu_ops::cuda::sm90 {

// Entry e is the weight of column j and row i with e = j - i + kRows - 1. It is there twice, the second time one word
// further on: pairs of columns are aligned in one of them, and both are read without bank conflicts.
template <int kRows, int kCols>
struct DiagonalWindow {
  static constexpr int kEntries = kRows + kCols, kCopy = (kEntries + 17) * 4, kBytes = 2 * (kCopy + 12);

  uint32_t base;

  __device__ __forceinline__ void set(int e, float weight) const {
#pragma unroll
    for (int copy = 0; copy < 2; ++copy) ptx::st_shared(base + copy * kCopy + e * 4, __float_as_uint(weight));
  }
  // The same out of global memory, asynchronously.
  __device__ __forceinline__ void copy(int e, const float* from) const {
#pragma unroll
    for (int copy = 0; copy < 2; ++copy) ptx::cp_async_4(base + copy * kCopy + e * 4, from);
  }
  // Column less row of entry 0, of a window from row `row` and column `col` on.
  __device__ static int distance(int row, int col) { return col - row - (kRows - 1); }
  // Does it have the weights of rows [row, row + rows) and columns [col, col + cols) by their logical positions, where
  // entry 0 is that of distance `first`?
  __device__ static bool holds(const Mask& mask, int first, int row, int rows, int col, int cols) {
    return mask.position(col) - mask.position(row + rows - 1) >= first &&
           mask.position(col + cols - 1) - mask.position(row) < first + kEntries;
  }
  __device__ uint32_t at(int e) const { return base + e * 4; }
  // Where the weights of row `row` and columns `col` and `col` + 1 are; those of columns 8 further on are 32 bytes
  // further on.
  __device__ uint32_t pair(int row, int col) const {
    const int e = col - row + kRows - 1;
    return base + e * 4 + (e & 1) * kCopy;
  }
};

}  // namespace hstu_ops::cuda::sm90
