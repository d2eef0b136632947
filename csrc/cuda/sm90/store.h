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

// A warp's 16 rows of 64 columns in `tile` to `to`, from row `first` of `rows` on.
template <class T>
__device__ __forceinline__ void store_rows(const SmemTile<T, 64>& tile, const GlobalRows<T>& to, int first, int rows) {
  if (to.aligned && to.dim >= 64 && first + 16 <= rows) {
    const int row = lane_id() / 8, chunk = lane_id() % 8;
    T* target = to.data + (first + row) * to.row_stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::st_global(target, ptx::ld_shared_u4(tile.at(row + 4 * i, chunk)));
      target += 4 * to.row_stride;
    }
  } else {
    store_tile<16, 32>(tile, 0, to, first, rows, lane_id());
  }
}

// A warp's 16 rows, from query `first` of the job's sequence on; `staging` has room for 64 columns of them. Rows past
// the last query and columns past the last dimension are left alone.
template <class T, int kValues>
__device__ __forceinline__ void store_output(const SmemTile<T, 64>& staging, const AttentionFwdParams& params,
                                             const Job& job, int head, int first, const float (&acc)[kValues]) {
  if (first < 0 || first >= job.sequence.num_q) return;
  const AttentionProblem& problem = params.problem;
  const RowScale scale(problem.scale, job.item.sequence, job.sequence.begin_q);
  GlobalRows<T> rows(params.out, job.sequence.begin_q, head, problem.dim_v);
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
    store_rows(staging, rows, first, job.sequence.num_q);
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
