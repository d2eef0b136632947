// Between a kernel and the one before it in a stream.
#pragma once

namespace hstu_ops::ptx {

// Waits until the kernels before this one have finished and what they wrote can be read; where this one was not
// launched early there is nothing to wait for.
__device__ __forceinline__ void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace hstu_ops::ptx
