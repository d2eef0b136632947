// What the time term adds to the scores of a tile of several buckets: a comparison for each boundary, or a look-up in
// the cells for each score.
#pragma once

#include "cuda/sm90/fwd_bias.h"

namespace hstu_ops::cuda::sm90 {

// A warp's tile of 16 queries from mask row `row` on and 64 keys from column `col` on, `warp` in its block; times: low
// words of those of its queries; scratch: 2 KB of shared memory of its own.
struct BiasTile {
  int warp, row, col;
  const int* times;
  uint32_t scratch;
};

// The lane, read where it is used: not kept in registers from tile to tile.
struct Lane {
  const int id = ptx::thread_index() % 32;

  __device__ int row() const { return id / 4; }
  __device__ int col() const { return id % 4 * 2; }
};

// A difference of the low words of times.
__device__ __forceinline__ int minus(int a, int b) { return static_cast<int>(0u + a - b); }

// Adds to the scores, whose first bucket's weight is there already, what the next bucket has more: where times of
// columns are at most those of rows less the boundary.
template <class C>
__device__ __forceinline__ void add_step(const BiasStage<C>& stage, int low, int high, int left, float change,
                                         Accumulator<1, 8>& s) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int2 t = ptx::ld_shared_int_v2(stage.time(n * 8 + ptx::thread_index() % 4 * 2));
    float* x = s.x[0][n];
    if (minus(t.x, left) <= low) x[0] += change;
    if (minus(t.y, left) <= low) x[1] += change;
    if (minus(t.x, left) <= high) x[2] += change;
    if (minus(t.y, left) <= high) x[3] += change;
  }
}

// The same for some buckets, whose boundaries may be far from all gaps.
template <class C>
__device__ __forceinline__ void add_steps(const TimeTerm& time, const BiasStage<C>& stage, const BiasTile& at,
                                          const BiasNote& note, float argument, Accumulator<1, 8>& s) {
  const Lane lane;
  const int left = ptx::ld_shared_int(stage.time(0));
  const int64_t since = time.query_time(at.row + lane.id % 16) - time.key_time(at.col);
  const int64_t* boundary = time.boundaries + note.first();
  const float* weight = time.weight + note.first();
#pragma unroll 1
  for (int i = 0; i < note.steps(); ++i) {
    const int64_t limit64 = since - __ldg(boundary + i);
    const float change = argument * (__ldg(weight + i + 1) - __ldg(weight + i));
    const int limit = limit64 > INT32_MAX   ? INT32_MAX
                      : limit64 < INT32_MIN ? INT32_MIN
                                            : static_cast<int>(limit64);  // times of columns are not negative
    add_step(stage, __shfl_sync(~0u, limit, lane.row()), __shfl_sync(~0u, limit, lane.row() + 8), left, change, s);
  }
}

// s += argument weight[bucket] of a tile whose gaps the cells answer for; kOne: all of one octave.
template <bool kOne, class C>
__device__ __forceinline__ void look_up(const BiasStage<C>& stage, const typename BiasTables<C>::Cells& cells,
                                        const Octave& one, const int* times, Accumulator<1, 8>& s) {
  const Lane lane;
  const int rows[2] = {times[lane.row()], times[lane.row() + 8]};
  constexpr int kBatch = C::kDim == 128 ? 1 : 2;  // tensor core tiles whose loads are in flight together
#pragma unroll
  for (int first = 0; first < 8; first += kBatch) {
    int gap[kBatch][4];
    uint32_t at[kBatch][4];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int2 t = ptx::ld_shared_int_v2(stage.time((first + n) * 8 + lane.col()));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        gap[n][e] = minus(rows[e / 2], e % 2 ? t.y : t.x);
        at[n][e] = cells.cell(gap[n][e], kOne ? one : cells.octave(cells.octave_of(gap[n][e])));
      }
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (gap[n][e] >= ptx::ld_shared_int(at[n][e])) at[n][e] += 4;
#pragma unroll
    for (int n = 0; n < kBatch; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s.x[0][first + n][e] += ptx::ld_shared(at[n][e] + cells.kWeight);
  }
}

}  // namespace hstu_ops::cuda::sm90
