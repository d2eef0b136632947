// The position term of the relative bias: one weight per distance of logical positions. Over most tiles it is constant
// along diagonals, which one load, or one sum of gradients, serves.
#pragma once

#include "core/bias.h"
#include "core/params.h"
#include "cuda/ptx/memory.h"
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

  // Do all elements of the tile read entries that run along its diagonals, but for what is clamped? Rows past the end
  // may do as they please.
  __device__ __forceinline__ static bool linear(const Mask& mask, TileOrigin o, int queries, int keys) {
    const bool history = mask.history == mask.len || max_int(o.query + queries, o.key + keys) <= mask.history + 1;
    return history && min_int(o.query, o.key) >= mask.shift();
  }
  // The same, and nothing is clamped.
  __device__ __forceinline__ bool diagonal(const Mask& mask, TileOrigin o, int queries, int keys) const {
    const int lowest = o.key - (o.query + queries - 1) + positions - 1,
              highest = o.key + keys - 1 - o.query + positions - 1;
    return linear(mask, o, queries, keys) && lowest >= 0 && highest <= 2 * positions - 2;
  }

  // s += argument weight
  template <bool kTransposed, int kM, int kN>
  __device__ __forceinline__ void add_elementwise(Accumulator<kM, kN>& s, const Mask& mask, TileOrigin o,
                                                  float argument) const {
    const int lane = ptx::thread_index() % 32;
    s.each([&](float& x, int row, int col) {
      const int i = row + lane / 4, j = col + lane % 4 * 2;
      const int at = position_index(mask.position(o.query + (kTransposed ? j : i)),
                                    mask.position(o.key + (kTransposed ? i : j)), positions);
      x = fmaf(argument, __ldg(weight + at), x);
    });
  }

  // One element at a time: rare.
  template <bool kTransposed, int kM, int kN>
  __device__ __forceinline__ void sum_elementwise(const Accumulator<kM, kN>& ds, const Mask& mask, TileOrigin o,
                                                  const TableTarget& to) const {
#pragma unroll 1
    for (int at = 0; at < kM * kN * 4; ++at) {
      const int lane = ptx::thread_index() % 32;
      const int i = element_row<kN>(at, lane), j = element_col<kN>(at, lane);
      const int query = mask.position(o.query + (kTransposed ? j : i)),
                key = mask.position(o.key + (kTransposed ? i : j));
      to.add(position_index(query, key, positions), ds.pick(at));
    }
  }
};

static __device__ const float kNoWeights[256] = {};

// The diagonals of a tile where PositionTerm::diagonal: elements with the same 8 (n - 2 m - h) + c share one.
template <bool kTransposed, int kM, int kN>
struct Diagonals {
  static constexpr int kFirst = 1 - 2 * kM, kCount = kN - kFirst;  // blocks of 8 x 8 on a diagonal, n - 2 m - h

  int from;  // entry of this lane's elements in block diagonal 0

  __device__ __forceinline__ Diagonals(const PositionTerm& p, TileOrigin o) {
    const int step = lane_col() - lane_row();
    from = o.key - o.query + p.positions - 1 + (kTransposed ? -step : step);
  }
  // Where all offsets lead to zeros.
  __device__ static const float* zeros() {
    static_assert(8 * kCount < 128);
    return kNoWeights + 128;
  }
  __device__ static constexpr int offset(int d, int c) { return kTransposed ? -8 * d - c : 8 * d + c; }

  // Sums of ds, lane by lane.
  __device__ __forceinline__ void sum(const Accumulator<kM, kN>& ds, const TableTarget& to) const {
#pragma unroll
    for (int d = kFirst; d < kN; ++d)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = 0.f;
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r)
          if (d + r >= 0 && d + r < kN) sum += ds.x[r / 2][d + r][r % 2 * 2 + c];
        to.add(from + offset(d, c), sum);
      }
  }

  // The same of ds rounded to T, with tensor cores and across lanes.
  template <class T>
  __device__ __forceinline__ void sum_products(const PositionTerm& p, TileOrigin o, const Accumulator<kM, kN>& ds,
                                               const TableTarget& to) const {
    // An 8 x 8 block of accumulators, packed, is a transposed right operand; times a unit matrix it is added to the sum
    // of its block diagonal. One product serves two: blocks 2 i and 2 i + 1 stand in rows 0 to 7 and 8 to 15.
    constexpr int kPairs = (2 * kM + kN + 1) / 2;  // from block diagonal -2 kM on
    const int lane = lane_id(), rho = lane / 4, quad = lane % 4;
    const uint32_t unit = rho / 2 == quad ? pack(rho % 2 == 0 ? 1.f : 0.f, rho % 2 == 1 ? 1.f : 0.f, T{}) : 0;
    const uint32_t units[4] = {unit, 0, 0, unit};
    float sums[kPairs + 1][4] = {};
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r)
#pragma unroll
      for (int n = -(r % 2); n < kN; n += 2) {
        const auto block = [&](int n) {
          if (n < 0 || n >= kN) return 0u;
          const float* x = &ds.x[r / 2][n][r % 2 * 2];
          return pack(x[0], x[1], T{});
        };
        ptx::mma_m16n8k16(sums[(n - r + 2 * kM) / 2], units, block(n), block(n + 1), T{});
      }
    // Entry (i, k) of a sum, i = rho and k = 2 quad + c, lies 8 d + i - k from block diagonal 0. Lanes of one rho take
    // what lies 8 d + rho away: i = k + rho of d, or i = k + rho - 8 of d + 1.
    constexpr int kSums = 8;
    static_assert(2 * kM + kN <= kSums);
    float t[kSums] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int source = (rho + 2 * quad + c) % 8 * 4 + quad;
      const bool wraps = rho + 2 * quad + c >= 8;
      float here = 0.f;  // block diagonal -2 kM is empty
#pragma unroll
      for (int d = 0; d < 2 * kM + kN; ++d) {
        const float next = d + 1 < 2 * kM + kN ? __shfl_sync(~0u, sums[(d + 1) / 2][(d + 1) % 2 * 2 + c], source) : 0.f;
        t[d] += wraps ? next : here;
        here = next;
      }
    }
    sum_quarters(t, quad);  // over the lanes of a rho
    const int d = (quad & 1) * 4 + (quad & 2) - 2 * kM;
    const int origin = o.key - o.query + p.positions - 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int away = 8 * (d + i) + rho;
      if (t[i] != 0.f) to.add(origin + (kTransposed ? -away : away), t[i]);
    }
  }
};

}  // namespace hstu_ops::cuda
