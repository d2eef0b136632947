// What is left after the main backward kernel: fp32 sums of dQ to the type and strides of grad_q, exact table sums to
// fp32.
#pragma once

#include "core/launch.h"
#include "cuda/errors.h"
#include "cuda/sm80/sums.cuh"
#include "cuda/tile/load.h"
#include "cuda/tile/workspace.h"

namespace hstu_ops::cuda::sm80 {

struct FinishArguments {
  AttentionBwdParams params;
  BwdWorkspace workspace;
  int padded_dim, columns;  // columns: see sums.cuh
};

template <class T>
__global__ void __launch_bounds__(256) attention_bwd_finish_kernel(const __grid_constant__ FinishArguments f) {
  const AttentionProblem& a = f.params.problem;
  constexpr int kPer = 16 / sizeof(T);
  const int blocks = f.padded_dim / 16, per_part = f.columns / 16;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x, thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const GlobalRows<T> to(f.params.grad_q, 0, 0, a.dim_qk);
  for (int64_t i = thread; i < a.jagged.total_q * a.heads * blocks; i += stride) {  // sixteen columns of a row
    const int block = static_cast<int>(i % blocks), col = block * 16;
    if (col >= a.dim_qk) continue;
    const int64_t row = i / blocks / a.heads;
    const int head = static_cast<int>(i / blocks % a.heads);
    float x[16];
    read_sums(f.workspace.grad_q + block % per_part * 16 +
                  sum_row(a.jagged.total_q, blocks / per_part, f.columns, head, block / per_part, row),
              x);
    T* target = to.data + row * to.row_stride + head * f.params.grad_q.head_stride + col;
#pragma unroll
    for (int k = 0; k < 16; k += kPer) {
      uint4 chunk;
      T y[kPer];
#pragma unroll
      for (int j = 0; j < kPer; ++j) y[j] = from_float<T>(x[k + j]);
      memcpy(&chunk, y, sizeof(chunk));
      if (to.aligned && col + k + kPer <= a.dim_qk) {
        *reinterpret_cast<uint4*>(target + k) = chunk;
      } else {
        scatter_chunk(target + k, chunk, a.dim_qk - col - k);
      }
    }
  }
  f.workspace.tables.round(thread, stride);
}

template <class T>
Status finish_bwd(const AttentionBwdParams& params, const BwdWorkspace& workspace, int padded_dim, int columns,
                  cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  const int64_t chunks = a.jagged.total_q * a.heads * (padded_dim / 16);
  const int64_t most = workspace.tables.entries() > chunks ? workspace.tables.entries() : chunks;
  const int64_t blocks = (most + 1023) / 1024;
  constexpr int64_t kMost = 1 << 20;
  attention_bwd_finish_kernel<T><<<static_cast<unsigned>(blocks < 1       ? 1
                                                         : blocks < kMost ? blocks
                                                                          : kMost),
                                   256, 0, stream>>>({params, workspace, padded_dim, columns});
  HSTU_TRY(cudaGetLastError());
  return {};
}

}  // namespace hstu_ops::cuda::sm80
