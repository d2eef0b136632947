// How a computing warp of the Hopper backward adds a bias: its scores, 16 keys by 64 queries, begin from the bias over
// alpha, to which the product is added. Before it registers are free; behind it there would be none. (In the kernel for
// dQ scores are 16 queries by 64 keys: kTransposed is false.)
#pragma once

#include "cuda/ptx/math.h"
#include "cuda/sm90/fwd_bias_add.h"
#include "cuda/sm90/score_factors.h"

namespace hstu_ops::cuda::sm90 {

// Dense bias, from global memory into the registers of the scores. row, col: of the warp's tile; queries and keys or,
// if kTransposed, the reverse.
template <bool kTransposed>
__device__ __forceinline__ void start_from_dense(const DenseBias& bias, int row, int col, const ScoreFactors& factors,
                                                 Accumulator<1, 8>& s) {
  const int lane = ptx::thread_index() % 32;
  row += lane / 4, col += lane % 4 * 2;
  const int64_t down = kTransposed ? 1 : bias.row_stride, right = kTransposed ? bias.row_stride : 1;
  const float* corner = bias.data + row * down + col * right;
  s.each([&](float& x, int i, int j) {
    const bool inside = row + i >= 0 && row + i < bias.size && col + j >= 0 && col + j < bias.size;
    x = ptx::ld_global_if(inside, corner + i * down + j * right);
  });
  s.each([&](float& x, int, int) { x = ptx::max_or_nan(x, factors.least) * factors.bias; });
}

// Relative bias. `factor`: what weights are multiplied with. place() and ready(): see add_uncommon().
template <class B, class Place, class Ready>
__device__ __forceinline__ void start_from_bias(const AttentionProblem& problem, const Job& job,
                                                const BiasStage<B>& stage, const BiasTables<B>& tables,
                                                const Place& place, float factor, Accumulator<1, 8>& s,
                                                const Ready& ready) {
  const WarpNote note = stage.note(place().warp);
  const int2 head = note.head();
  const unsigned code = ptx::uniform(head.x);
  const float weight = __int_as_float(head.y);
  const Lane lane;
  const uint32_t window = tables.diagonals(stage, code, place().warp * 16 + lane.row(), lane.col());
#pragma unroll
  for (int d = -1; d < 8; ++d) {
    const float2 w = ptx::ld_shared_v2(window + d * 32);
    const float x = fmaf(factor, w.x, weight), y = fmaf(factor, w.y, weight);
    if (d >= 0) s.x[0][d][0] = x, s.x[0][d][1] = y;
    if (d < 7) s.x[0][d + 1][2] = x, s.x[0][d + 1][3] = y;
  }
  add_uncommon(problem, job, stage, tables, note, code, place, factor, s, ready);
}

}  // namespace hstu_ops::cuda::sm90
