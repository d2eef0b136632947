// A kernel that may start while the one before it in the stream still runs (programmatic dependent launch): as blocks
// of the first leave, blocks of the second take their places.
#pragma once

namespace hstu_ops::ptx {

// Of the first kernel: the second may start as soon as every block has said this or left.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Of the second: waits for the end of the first, whose writes are visible then. Before Hopper there is nothing to wait
// for: the second starts then.
__device__ __forceinline__ void wait_for_prerequisites() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace hstu_ops::ptx
