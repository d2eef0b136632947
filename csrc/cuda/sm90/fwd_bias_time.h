// What the time term adds to the scores of a tile of several buckets: a comparison for each boundary, or a look-up in
// the cells for each score.
#pragma once

#include "cuda/sm90/fwd_bias.h"

namespace hstu_ops::cuda::sm90 {

// A warp's tile of 16 queries from mask row `row` on and 64 keys from column `col` on (transposed: keys and queries),
// `warp` in its block; times: low words of those of its rows; scratch: 2 KB of shared memory of its own.
struct BiasTile {
  int warp, row, col;
  const int* times;
  uint32_t scratch;
};

// A sum of the low words of times.
__device__ __forceinline__ int plus(int a, int b) { return static_cast<int>(0u + a + b); }

// Adds to the scores, which have the weight of the first bucket, what the next ones have more, boundary by boundary:
// where times of columns, less that of the first column, are at most a limit of the row.
template <class B>
__device__ __forceinline__ void add_steps(const BiasStage<B>& stage, const WarpNote& note, int count, const int* times,
                                          Accumulator<1, 8>& s) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Lane lane;
    const int2 step = note.step(i);
    const int low = plus(times[lane.row()], step.x), high = plus(times[lane.row() + 8], step.x);
    const float change = __int_as_float(step.y);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int2 t = ptx::ld_shared_int_v2(stage.time(n * 8 + lane.col()));
      float* x = s.x[0][n];
      if (t.x <= low) x[0] += change;
      if (t.y <= low) x[1] += change;
      if (t.x <= high) x[2] += change;
      if (t.y <= high) x[3] += change;
    }
  }
}

// s += argument weight[bucket] of a tile whose gaps the cells answer for; kOne: all of one octave; code: the note's.
// The loop is rolled: unrolled, it would push the rest of the kernel out of the instruction cache.
template <bool kOne, class B>
__device__ __forceinline__ void look_up(const BiasStage<B>& stage, const typename BiasTables<B>::Cells& cells,
                                        const Octave& one, unsigned code, const int* times, Accumulator<1, 8>& s) {
  const Lane lane;
  const int left = stage.left(), rows[2] = {minus(times[lane.row()], left), minus(times[lane.row() + 8], left)};
  constexpr int kBatch = 2;  // tensor core tiles whose look-ups are in flight together
  const uint32_t first_cell = cells.first(one);
#pragma unroll 1
  for (int first = 0; first < 8; first += kBatch) {
    if (!WarpNote::kept_block<B::kTransposed>(code, first, kBatch)) continue;
    int gap[kBatch][4];
    uint32_t at[kBatch][4];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int2 t = ptx::ld_shared_int_v2(stage.time((first + n) * 8 + lane.col()));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        gap[n][e] = minus(rows[e / 2], e % 2 ? t.y : t.x);
        at[n][e] = kOne ? cells.cell_from(first_cell, gap[n][e], one.shift) : cells.cell(gap[n][e]);
      }
    }
    float w[kBatch][4];
    cells.weigh(gap, at, w);
    s.each_from<kBatch>(first, [&](float& x, int, int n, int e) { x += w[n % kBatch][e]; });
  }
}

// The same, if the note says that the tile is looked up.
template <class B>
__device__ __forceinline__ void look_up_if_noted(const BiasStage<B>& stage, const BiasTables<B>& tables,
                                                 const WarpNote& note, unsigned code, const int* times,
                                                 Accumulator<1, 8>& s) {
  if (code & WarpNote::kOneOctave) {
    const Octave one = {static_cast<int>(code / WarpNote::kShift % 32), note.words().x};
    look_up<true>(stage, tables.cells(), one, code, times, s);
  } else if (code & WarpNote::kCells) {
    look_up<false>(stage, tables.cells(), {}, code, times, s);
  }
}

}  // namespace hstu_ops::cuda::sm90
