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

// Stores four columns' sums, values 4 i to 4 i + 3 of this thread's accumulators, over the kSize blocks of a cluster,
// in the order of their ranks.
template <class T, int kSize>
__device__ __forceinline__ void store_four(uint32_t own, int i, int first, int num_q, const GlobalRows<T>& rows) {
  float4 part[kSize];
#pragma unroll
  for (int p = 0; p < kSize; ++p) part[p] = ptx::ld_cluster_v4(own, p);
  float sum[4] = {};
#pragma unroll
  for (int p = 0; p < kSize; ++p) sum[0] += part[p].x, sum[1] += part[p].y, sum[2] += part[p].z, sum[3] += part[p].w;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int query = first + lane_row() + e / 2 * 8, col = i * 8 + lane_col() + e % 2;
    if (exists(query, num_q) && col < rows.dim) rows.data[query * rows.row_stride + col] = from_float<T>(sum[e]);
  }
}

// The sums over a cluster's blocks of the accumulators of kThreads threads each. Every block sums and stores a share of
// the columns. `memory`: 4 bytes for each value of each thread; all threads call this.
template <class T, int kThreads, int kValues>
__device__ __forceinline__ void store_sum(uint32_t memory, int thread, const AttentionFwdParams& params, const Job& job,
                                          int first, const float (&acc)[kValues]) {
  const AttentionProblem& problem = params.problem;
  const RowScale scale(problem.scale, job.item.sequence, job.sequence.begin_q);
  const GlobalRows<T> rows(params.out, job.sequence.begin_q, job.item.head, problem.dim_v);
  const int num_q = job.sequence.num_q, last = num_q - 1;
  const bool any = first >= 0 && first < num_q;
  const float low = scale(clamp_int(first + lane_row(), 0, last)),
              high = scale(clamp_int(first + lane_row() + 8, 0, last));
  const uint32_t own = memory + thread * 16;
  constexpr int kPitch = kThreads * 16;
  if (any)
#pragma unroll
    for (int i = 0; i < kValues / 4; ++i) {
      const float* x = acc + 4 * i;
      ptx::st_shared(own + i * kPitch, make_float4(x[0] * low, x[1] * low, x[2] * high, x[3] * high));
    }
  ptx::cluster_sync();
  const int size = ptx::cluster_size(), share = kValues / 4 / size, begin = ptx::cluster_rank() * share;
  for (int i = begin; any && i < begin + share; ++i) {
    if (size == 2) {
      store_four<T, 2>(own + i * kPitch, i, first, num_q, rows);
    } else if (size == 4) {
      store_four<T, 4>(own + i * kPitch, i, first, num_q, rows);
    } else {
      store_four<T, 8>(own + i * kPitch, i, first, num_q, rows);
    }
  }
  ptx::cluster_sync();  // nobody leaves while others read
}

}  // namespace hstu_ops::cuda::sm90
