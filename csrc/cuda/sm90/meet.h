// A named barrier for code that may part a warp's lanes.
#pragma once

#include "cuda/ptx/named_barrier.h"

namespace hstu_ops::cuda::sm90 {

// A barrier of warps whose lanes may have taken different ways to it.
__device__ __forceinline__ void meet(int id, int threads) {
  __syncwarp();
  ptx::named_barrier_sync(id, threads);
}

}  // namespace hstu_ops::cuda::sm90
