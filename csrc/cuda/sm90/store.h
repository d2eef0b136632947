// Accumulators of a computing warpgroup to global memory, warp by warp through shared memory of its own.
#pragma once

#include "cuda/ptx/ldmatrix.h"
#include "cuda/tile/load.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/score.h"

namespace hstu_ops::cuda::sm90 {

// A warp's 16 rows, from query `first` of the job's sequence on; `staging` has room for 64 columns of them. Rows past the
// last query and columns past the last dimension are left alone.
template <class T, int kValues>
__device__ __forceinline__ void store_output(const SmemTile<T, 64>& staging, const AttentionFwdParams& params,
                                             const Job& job, int first, const float (&acc)[kValues]) {
  const AttentionProblem& problem = params.problem;
  const RowScale scale(problem.scale, job.item.sequence, job.sequence.begin_q);
  GlobalRows<T> rows(params.out, job.sequence.begin_q, job.item.head, problem.dim_v);
  const int last = job.sequence.num_q - 1;
  const float low = scale(min_int(first + lane_row(), last)), high = scale(min_int(first + lane_row() + 8, last));
#pragma unroll
  for (int panel = 0; panel < kValues / 32; ++panel) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* x = &acc[panel * 32 + i * 8];
      const uint32_t r[4] = {pack(x[0] * low, x[1] * low, T{}), pack(x[2] * high, x[3] * high, T{}),
                             pack(x[4] * low, x[5] * low, T{}), pack(x[6] * high, x[7] * high, T{})};
      ptx::stmatrix_x4(staging.at(lane_id() % 16, i * 2 + lane_id() / 16), r);
    }
    __syncwarp();
    store_tile<16, 32>(staging, 0, rows, first, job.sequence.num_q, lane_id());
    __syncwarp();
    rows.data += 64, rows.dim -= 64;
  }
}

}  // namespace hstu_ops::cuda::sm90
