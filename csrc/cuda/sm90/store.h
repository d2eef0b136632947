// Accumulators of the computing warpgroups to global memory: warp by warp through shared memory of its own, or the sums
// of those of a cluster.
#pragma once

#include <type_traits>

#include "cuda/ptx/cluster.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/load.h"
#include "cuda/tile/schedule.h"
#include "cuda/tile/score.h"

namespace hstu_ops::cuda::sm90 {

// Accumulators of a warp's 16 rows, times the factor of the lower and that of the upper eight, to those rows from
// `first` on that exist, by way of `staging`, which has room for 64 columns of them.
template <class T, int kValues>
__device__ __forceinline__ void store_staged(const SmemTile<T, 64>& staging, const GlobalRows<T>& to, int first,
                                             int rows, const float (&acc)[kValues], float low, float high) {
  const int lane = ptx::thread_index() % 32, row = lane / 8, chunk = lane % 8;  // read again: see thread_index
  T* const target = to.data + (first + row) * to.row_stride + chunk * 8;
  by_chunks(to, [&](auto has_chunks) {
#pragma unroll
    for (int panel = 0; panel < kValues / 32; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = &acc[panel * 32 + i * 8];
        const uint32_t r[4] = {pack(x[0] * low, x[1] * low, T{}), pack(x[2] * high, x[3] * high, T{}),
                               pack(x[4] * low, x[5] * low, T{}), pack(x[6] * high, x[7] * high, T{})};
        ptx::stmatrix_x4(staging.at(lane % 16, i * 2 + lane / 16), r);
      }
      __syncwarp();
      uint4 chunks[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) chunks[i] = ptx::ld_shared_u4(staging.at(row + 4 * i, chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int left = exists(first + row + 4 * i, rows) ? to.dim - chunk * 8 - panel * 64 : 0;
        store_chunk(has_chunks, target + 4 * i * to.row_stride + panel * 64, left, chunks[i]);
      }
      __syncwarp();
    }
  });
}

// A warp's 16 rows, from query `first` of the job's sequence on. Rows past the last query and columns past the last
// dimension are left alone.
template <class T, int kValues>
__device__ __forceinline__ void store_output(const SmemTile<T, 64>& staging, const AttentionFwdParams& params,
                                             const Job& job, int head, int first, const float (&acc)[kValues]) {
  if (first < 0 || first >= job.sequence.num_q) return;
  const AttentionProblem& problem = params.problem;
  const RowScale scale(problem.scale, job.item.sequence, job.sequence.begin_q);
  const GlobalRows<T> rows(params.out, job.sequence.begin_q, head, problem.dim_v);
  const int last = job.sequence.num_q - 1;
  const float low = scale(min_int(first + lane_row(), last)), high = scale(min_int(first + lane_row() + 8, last));
  store_staged(staging, rows, first, job.sequence.num_q, acc, low, high);
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
  const int size = ptx::cluster_size(), rank = ptx::cluster_rank(), end = kValues / 4 * (rank + 1) / size;
  for (int i = kValues / 4 * rank / size; any && i < end; ++i) {
    const auto store = [&](auto constant) {
      store_four<T, decltype(constant)::value>(own + i * kPitch, i, first, num_q, rows);
    };
    switch (size) {
      case 2:
        store(std::integral_constant<int, 2>{});
        break;
      case 3:
        store(std::integral_constant<int, 3>{});
        break;
      case 4:
        store(std::integral_constant<int, 4>{});
        break;
      case 5:
        store(std::integral_constant<int, 5>{});
        break;
      case 6:
        store(std::integral_constant<int, 6>{});
        break;
      case 7:
        store(std::integral_constant<int, 7>{});
        break;
      default:
        store(std::integral_constant<int, 8>{});
    }
  }
  ptx::cluster_sync();  // nobody leaves while others read
}

}  // namespace hstu_ops::cuda::sm90
