// The position term of the relative bias: one weight per distance of logical positions. Over most tiles it is constant
// along diagonals, which one load, or one sum of gradients, serves.
#pragma once

#include "core/bias.h"
#include "core/params.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "cuda/tile/layout.h"
#include "cuda/tile/table_grad.h"

namespace hstu_ops::cuda {

// The tile's first query and key; queries run along the rows unless kTransposed.
struct TileOrigin {
  int query, key;
};

// Table of 2 * positions - 1 weights by the distance of logical positions.
struct PositionTerm {
  const float* weight;  // null: absent
  int positions;

  __device__ PositionTerm(const RelativeBiasParams& p, int head)
      : weight(p.position_weight ? static_cast<const float*>(p.position_weight) + head * p.position_head_stride
                                 : nullptr),
        positions(p.positions) {}

  // Do all elements of the tile read entries that run along its diagonals, with nothing to clamp? Rows past the end may
  // do as they please.
  __device__ __forceinline__ bool diagonal(const Mask& mask, TileOrigin o, int queries, int keys) const {
    const int lowest = o.key - (o.query + queries - 1) + positions - 1,
              highest = o.key + keys - 1 - o.query + positions - 1;
    const bool linear = mask.history == mask.len || max_int(o.query + queries, o.key + keys) <= mask.history + 1;
    return linear && min_int(o.query, o.key) >= mask.shift() && lowest >= 0 && highest <= 2 * positions - 2;
  }

  // s = alpha s + argument (weight + constant)
  template <bool kTransposed, int kM, int kN>
  __device__ __forceinline__ void add(Accumulator<kM, kN>& s, const Mask& mask, TileOrigin o, float alpha,
                                      float argument, float constant) const {
    constexpr int kRows = kM * 16, kCols = kN * 8;
    if (!weight) {
      const float b = argument * constant;
      s.each([=](float& x, int, int) { x = fmaf(x, alpha, b); });
    } else if (diagonal(mask, o, kTransposed ? kCols : kRows, kTransposed ? kRows : kCols)) {
      const int step = lane_col() - lane_row();
      const float shift = argument * constant;
      const float* from = weight + (o.key - o.query + positions - 1 + (kTransposed ? -step : step));
      // One load serves all elements of a diagonal: those with the same 8 (n - 2 m - h) + c.
#pragma unroll
      for (int d = 1 - 2 * kM; d < kN; ++d)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int offset = 8 * d + c;
          const float b = fmaf(argument, __ldg(from + (kTransposed ? -offset : offset)), shift);
#pragma unroll
          for (int r = 0; r < 2 * kM; ++r)
            if (d + r >= 0 && d + r < kN) {
              float& x = s.x[r / 2][d + r][r % 2 * 2 + c];
              x = fmaf(x, alpha, b);
            }
        }
    } else {
      s.each([&](float& x, int row, int col) {
        const int i = row + lane_row(), j = col + lane_col();
        const int at = position_index(mask.position(o.query + (kTransposed ? j : i)),
                                      mask.position(o.key + (kTransposed ? i : j)), positions);
        x = fmaf(x, alpha, argument * (__ldg(weight + at) + constant));
      });
    }
  }

  template <bool kTransposed, int kM, int kN>
  __device__ __forceinline__ void add_grad(const Accumulator<kM, kN>& ds, const Mask& mask, TileOrigin o,
                                           const TableTarget& to) const {
    constexpr int kRows = kM * 16, kCols = kN * 8;
    if (diagonal(mask, o, kTransposed ? kCols : kRows, kTransposed ? kRows : kCols)) {
      const int step = lane_col() - lane_row();
      const int from = o.key - o.query + positions - 1 + (kTransposed ? -step : step);
#pragma unroll
      for (int d = 1 - 2 * kM; d < kN; ++d)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int offset = 8 * d + c;
          float sum = 0.f;
#pragma unroll
          for (int r = 0; r < 2 * kM; ++r)
            if (d + r >= 0 && d + r < kN) sum += ds.x[r / 2][d + r][r % 2 * 2 + c];
          to.add(from + (kTransposed ? -offset : offset), sum);
        }
    } else {
#pragma unroll 1
      for (int at = 0; at < kM * kN * 4; ++at) {
        const int i = element_row<kN>(at), j = element_col<kN>(at);
        const int query = mask.position(o.query + (kTransposed ? j : i)),
                  key = mask.position(o.key + (kTransposed ? i : j));
        to.add(position_index(query, key, positions), ds.pick(at));
      }
    }
  }

  // Sums of a whole tile of dS' in shared memory, where it is diagonal: 8 x 8 blocks on a diagonal of blocks are summed
  // by products with two unit matrices side by side, then the 15 diagonals of the sum across lanes.
  template <class T, int kKeys, int kQueries, int kWarps, class Tile>
  __device__ __forceinline__ void add_tile_grad(const Tile& ds, TileOrigin o, const TableTarget& to) const {
    const int lane = lane_id(), row = lane / 4;
    const uint32_t unit = row / 2 == lane % 4 ? pack(row % 2 == 0 ? 1.f : 0.f, row % 2 == 1 ? 1.f : 0.f, T{}) : 0;
    const uint32_t units[4] = {unit, 0, unit, 0};
#pragma unroll 1
    for (int d = static_cast<int>(threadIdx.x / 32) - (kQueries / 8 - 1); d < kKeys / 8; d += kWarps) {
      const int end = min_int(kKeys / 8, kQueries / 8 + d);  // key blocks a < end meet query blocks a - d
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (int a = max_int(d, 0); a < end; a += 4) {
        const int block = min_int(a + lane / 8, end - 1);
        uint32_t f[4];
        ptx::ldmatrix_x4_trans(f, ds.at(block * 8 + lane % 8, block - d));
#pragma unroll
        for (int i = 1; i < 4; ++i)
          if (a + i >= end) f[i] = 0;
        ptx::mma_m16n8k16(sum, units, f[0], f[1], T{});
        ptx::mma_m16n8k16(sum, units, f[2], f[3], T{});
      }
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int key = lane - 7 + n;
        const float x = __shfl_sync(~0u, sum[n % 2], (key & 7) * 4 + n / 2);
        if (key >= 0 && key < 8) total += x;
      }
      if (lane < 15) to.add(o.key - o.query + positions - 1 + 8 * d + lane - 7, total);
    }
  }
};

}  // namespace hstu_ops::cuda
