// Accumulators of a warpgroup straight to global memory, past shared memory: what is left of an item does not hold up
// the next one's loads.
#pragma once

#include "cuda/sm90/store.h"

namespace hstu_ops::cuda::sm90 {

// Lanes whose bit is set give `low` and take the partner's `high` for it; the others the reverse.
__device__ __forceinline__ void swap_halves(uint32_t& low, uint32_t& high, int bit) {
  const bool set = lane_id() & bit;
  const uint32_t take = __shfl_xor_sync(~0u, set ? low : high, bit);
  (set ? low : high) = take;
}

// Lane l of each four has x[i] of chunk i, its number l there; then all four of chunk l.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  swap_halves(x[0], x[2], 2);
  swap_halves(x[1], x[3], 2);
  swap_halves(x[0], x[1], 1);
  swap_halves(x[2], x[3], 1);
}

// A warp's 16 rows, times the factor of the lower and that of the upper eight, to those rows from `row` on that exist.
template <class T, int kDim>
__device__ __forceinline__ void store_rows(const GlobalRows<T>& to, int row, int rows, const float (&sums)[kDim / 2],
                                           const float (&factors)[2]) {
  const int first = lane_id() % 4 * 8;  // columns: constants from here on take no registers
  by_chunks(to, [&](auto has_chunks) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = row + h * 8 + lane_row();
      T* const target = to.data + at * to.row_stride + first;
      const int left = exists(at, rows) ? to.dim - first : 0;
#pragma unroll
      for (int block = 0; block < kDim / 32; ++block) {
        uint32_t x[4];  // columns 8 i + lane_col() + {0, 1} of the block, then 8 (lane % 4) + 2 i + {0, 1}
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = sums + (block * 4 + i) * 4 + 2 * h;
          x[i] = pack(pair[0] * factors[h], pair[1] * factors[h], T{});
        }
        transpose_quad(x);
        store_chunk(has_chunks, target + block * 32, left - block * 32, make_uint4(x[0], x[1], x[2], x[3]));
      }
    }
  });
}

}  // namespace hstu_ops::cuda::sm90
