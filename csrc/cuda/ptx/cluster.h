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

// The floats at `address` of this block's shared memory, but in block `rank` of the cluster.
__device__ __forceinline__ float4 ld_cluster_v4(uint32_t address, int rank) {
  float4 x;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(address), "r"(rank)
      : "memory");
  return x;
}

}  // namespace hstu_ops::ptx
