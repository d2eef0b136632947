// Accumulators of the computing warpgroups to global memory: warp by warp through shared memory of its own, or the sums
// of those of a cluster.
#pragma once

#include "cuda/ptx/cluster.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/load.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/score.h"

namespace hstu_ops::cuda::sm90 {

// A warp's 16 rows, from query `first` of the job's sequence on; `staging` has room for 64 columns of them. Rows past
// the last query and columns past the last dimension are left alone.
template <class T, int kValues>
__device__ __forceinline__ void store_output(const SmemTile<T, 64>& staging, const AttentionFwdParams& params,
                                             const Job& job, int first, const float (&acc)[kValues]) {
  if (first < 0 || first >= job.sequence.num_q) return;
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

// The sums over a cluster's blocks, in the order of their ranks, of the accumulators of kThreads threads each. Every
// block sums and stores a share of the columns. `memory`: 4 bytes for each value of each thread; all threads call this.
template <class T, int kThreads, int kValues>
__device__ __forceinline__ void store_sum(uint32_t memory, int thread, const AttentionFwdParams& params, const Job& job,
                                          int first, const float (&acc)[kValues]) {
  const AttentionProblem& problem = params.problem;
  const RowScale scale(problem.scale, job.item.sequence, job.sequence.begin_q);
  const GlobalRows<T> rows(params.out, job.sequence.begin_q, job.item.head, problem.dim_v);
  const int last = job.sequence.num_q - 1;
  const float low = scale(clamp_int(first + lane_row(), 0, last)),
              high = scale(clamp_int(first + lane_row() + 8, 0, last));
  const uint32_t own = memory + thread * 4;
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    ptx::st_shared(own + i * kThreads * 4, __float_as_uint(acc[i] * (i / 2 % 2 ? high : low)));
  ptx::cluster_sync();
  const int rank = ptx::cluster_rank(), size = ptx::cluster_size(), share = kValues / size;
#pragma unroll 1
  for (int i = rank * share; i < (rank + 1) * share; ++i) {
    float x = 0.f;
    for (int p = 0; p < size; ++p) x += ptx::ld_cluster(own + i * kThreads * 4, p);
    const int query = first + lane_row() + i / 2 % 2 * 8, col = i / 4 * 8 + lane_col() + i % 2;
    if (exists(query, job.sequence.num_q) && col < rows.dim)
      rows.data[query * rows.row_stride + col] = from_float<T>(x);
  }
  ptx::cluster_sync();  // nobody leaves while others read
}

}  // namespace hstu_ops::cuda::sm90
