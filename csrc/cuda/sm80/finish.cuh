// What is left after the main backward kernel: fp32 sums of dQ to the type and strides of grad_q, exact table sums to
// fp32.
#pragma once

#include "core/launch.h"
#include "cuda/errors.h"
#include "cuda/tile/load.h"
#include "cuda/tile/workspace.h"

namespace hstu_ops::cuda::sm80 {

struct FinishArguments {
  AttentionBwdParams params;
  BwdWorkspace workspace;
  int padded_dim;
};

template <class T>
__global__ void __launch_bounds__(256) attention_bwd_finish_kernel(const __grid_constant__ FinishArguments f) {
  const AttentionProblem& a = f.params.problem;
  constexpr int kPer = 4;
  const int chunks = f.padded_dim / kPer;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x, thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const View& to = f.params.grad_q;
  const bool aligned =
      reinterpret_cast<uintptr_t>(to.data) % 16 == 0 && to.row_stride % kPer == 0 && to.head_stride % kPer == 0;
  for (int64_t i = thread; i < a.jagged.total_q * a.heads * chunks; i += stride) {
    const int col = static_cast<int>(i % chunks) * kPer;
    if (col >= a.dim_qk) continue;
    const int64_t row = i / chunks;
    const float4 x = reinterpret_cast<const float4*>(f.workspace.grad_q)[i];
    T* target = static_cast<T*>(to.data) + row / a.heads * to.row_stride + row % a.heads * to.head_stride + col;
    T y[kPer] = {from_float<T>(x.x), from_float<T>(x.y), from_float<T>(x.z), from_float<T>(x.w)};
    if (aligned && col + kPer <= a.dim_qk) {
      using Word = std::conditional_t<kIs16Bit<T>, uint2, uint4>;
      Word word;
      memcpy(&word, y, sizeof(word));
      *reinterpret_cast<Word*>(target) = word;
    } else {
#pragma unroll
      for (int k = 0; k < kPer; ++k)
        if (col + k < a.dim_qk) target[k] = y[k];
    }
  }
  for (const TableSums* t : {&f.workspace.position, &f.workspace.time})
    if (t->words)
      for (int64_t i = thread; i < t->entries; i += stride) t->sums[i] = t->total(i);
}

template <class T>
Status finish_bwd(const AttentionBwdParams& params, const BwdWorkspace& workspace, int padded_dim,
                  cudaStream_t stream) {
  const AttentionProblem& a = params.problem;
  const int64_t chunks = a.jagged.total_q * a.heads * (padded_dim / 4);
  const int64_t most = workspace.position.entries + workspace.time.entries > chunks
                           ? workspace.position.entries + workspace.time.entries
                           : chunks;
  const int64_t blocks = (most + 1023) / 1024;
  constexpr int64_t kMost = 1 << 20;
  attention_bwd_finish_kernel<T><<<static_cast<unsigned>(blocks < 1       ? 1
                                                         : blocks < kMost ? blocks
                                                                          : kMost),
                                   256, 0, stream>>>({params, workspace, padded_dim});
  HSTU_TRY(cudaGetLastError());
  return {};
}

}  // namespace hstu_ops::cuda::sm80
