// How a computing warp of the Hopper backward adds relative bias: its scores, 16 keys by 64 queries, begin from the
// bias over alpha, to which the product is added. Before it registers are free; behind it there would be none.
#pragma once

#include "cuda/sm90/fwd_bias_add.h"

namespace hstu_ops::cuda::sm90 {

// `factor`: what weights are multiplied with. ready(): called before the scratch is used, if it is.
template <class B, class Ready>
__device__ __forceinline__ void start_from_bias(const AttentionProblem& problem, const Job& job,
                                                const BiasStage<B>& stage, const BiasTables<B>& tables,
                                                const BiasTile& at, float factor, Accumulator<1, 8>& s,
                                                const Ready& ready) {
  const WarpNote note = stage.note(at.warp);
  const int2 head = note.head();
  const unsigned code = ptx::uniform(head.x);
  const float weight = __int_as_float(head.y);
  const Lane lane;
  const uint32_t window = tables.diagonals(stage, code, at.warp * 16 + lane.row(), lane.col());
#pragma unroll
  for (int d = -1; d < 8; ++d) {
    const float2 w = ptx::ld_shared_v2(window + d * 32);
    const float x = fmaf(factor, w.x, weight), y = fmaf(factor, w.y, weight);
    if (d >= 0) s.x[0][d][0] = x, s.x[0][d][1] = y;
    if (d < 7) s.x[0][d + 1][2] = x, s.x[0][d + 1][3] = y;
  }
  if (code == 0) return;
  add_times(stage, tables, note, code, at.times, s);
  if (code & WarpNote::kOneByOne) {
    ready();
    add_one_by_one<B::kTransposed>(problem, job, note, code, at, factor, s);
  }
}

}  // namespace hstu_ops::cuda::sm90
