// Sums by distance of positions of tiles with rows or columns that share a position: targets, and contextual ones.
#pragma once

#include "cuda/tile/layout.h"
#include "cuda/tile/position_bias.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda::sm90 {

// Of a warp's 16 queries and 64 keys. Rows that share a position are summed by column, the others' contextual columns
// by row. What is left, with zeros in their place, runs along diagonals: of other rows than targets no target column
// is kept. The last contextual row and the first target lie on the scale of the history, so that diagonals have them.
class ClampedSums {
 public:
  using Tile = Accumulator<1, 8>;

  __device__ __forceinline__ ClampedSums(const Mask& mask, TileOrigin at, int positions)
      : mask_(mask), at_(at), positions_(positions), lane_(ptx::thread_index() & 31) {}

  __device__ __forceinline__ void sum(Tile& ds, const TableTarget& to) const {
    const int row = at_.query + (lane_ >> 2), shift = mask_.shift();
#pragma unroll 1
    for (int kind = 0; kind < 2; ++kind) {
      const bool target = kind == 1;
      if (target ? at_.query + 15 <= mask_.history : at_.query >= shift) continue;
      const auto shared = [&](int i) { return target ? i > mask_.history : i < shift; };
      sum_rows(ds, shared(row), shared(row + 8), mask_.position(target ? mask_.history : 0), to);
    }
    if (at_.key < shift) sum_columns(ds, row, shift, to);
  }

 private:
  // Of rows at one position; low, high: whether the lane's are.
  __device__ __forceinline__ void sum_rows(Tile& ds, bool low, bool high, int position, const TableTarget& to) const {
    float t[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float *x = &ds.x[0][i / 2][i % 2], *y = x + 2;
      t[i] = (low ? *x : 0.f) + (high ? *y : 0.f);
      *x = low ? 0.f : *x, *y = high ? 0.f : *y;
    }
    // Over the eight lanes of a column, two columns of which stay in each.
    fold<8>(t, 4), fold<4>(t, 8), fold<2>(t, 16);
    const int n = (lane_ & 4) + (lane_ & 8) / 4 + (lane_ & 16) / 16;
#pragma unroll
    for (int c = 0; c < 2; ++c)
      to.add(position_index(position, mask_.position(at_.key + n * 8 + (lane_ & 3) * 2 + c), positions_), t[c]);
  }
  // Adds the values of two lanes that differ in bit `bit`, of which each keeps half.
  template <int kHalf>
  __device__ __forceinline__ void fold(float (&t)[16], int bit) const {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float keep = lane_ & bit ? t[i + kHalf] : t[i], send = lane_ & bit ? t[i] : t[i + kHalf];
      t[i] = keep + __shfl_xor_sync(~0u, send, bit);
    }
  }
  __device__ __forceinline__ void sum_columns(Tile& ds, int row, int end, const TableTarget& to) const {
    float t[2] = {};
    const int columns = end - at_.key - (lane_ & 3) * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = ds.x[0][n][e];
        const bool shared = n * 8 + e % 2 < columns;
        t[e / 2] += shared ? x : 0.f;
        x = shared ? 0.f : x;
      }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) t[h] += __shfl_xor_sync(~0u, t[h], bit);
      if ((lane_ & 3) == 0) to.add(position_index(mask_.position(row + h * 8), 0, positions_), t[h]);
    }
  }

  const Mask& mask_;
  TileOrigin at_;
  int positions_, lane_;
};

}  // namespace hstu_ops::cuda::sm90
