// Blocks of threads that run at the same time and read each other's shared memory. A launch without clusters is one of
// clusters of one block.
#pragma once

#include <cstdint>

namespace hstu_ops::ptx {

__device__ __forceinline__ int cluster_rank() {
  int x;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}
__device__ __forceinline__ int cluster_size() {
  int x;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
  return x;
}

// All threads of the cluster that have not exited; what they wrote to shared memory is visible to all.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The float at `address` of this block's shared memory, but in block `rank` of the cluster.
__device__ __forceinline__ float ld_cluster(uint32_t address, int rank) {
  float x;
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
               : "=f"(x)
               : "r"(address), "r"(rank)
               : "memory");
  return x;
}

}  // namespace hstu_ops::ptx
