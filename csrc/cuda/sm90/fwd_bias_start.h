// The relative bias of a tile by itself: what the backward's scores begin from, and what heads of the forward have in
// common.
#pragma once

#include "cuda/sm90/fwd_bias_add.h"

namespace hstu_ops::cuda::sm90 {

// `factor`: what weights are multiplied with. place() and ready(): see add_uncommon().
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
